"""What the layers of a model store of a token, and where on a mesh."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fdq.schemes.mesh_rules import Rules, as_set, repeats, shards

type Stored = tuple[tuple[int, int], tuple[int, int]]
"""Heads and channels of what a layer stores of a token, for the one half and the other."""


def stored_by(config: Any) -> list[Stored]:
    """What each layer stores: keys and values of all KV heads, or what `config.stored` says."""
    usual = (config.num_kv_heads, config.head_dim)
    ask = getattr(config, "stored", lambda layer: (usual, usual))
    return [ask(layer) for layer in range(config.num_layers)]


def on_mesh(config: Any, batch: int, mesh: Any, rules: Rules) -> tuple[NamedSharding, int]:
    """Where keys and values lie on a mesh, and how often each KV head is held."""
    mesh = rules.check(mesh)
    rows, heads = rules.axes("batch", mesh), rules.axes("heads", mesh)
    if batch % shards(mesh, rows):
        count = shards(mesh, rows)
        raise ValueError(
            f"KV cache: {batch} sequences over {', '.join(rows)}={count} devices does not divide. "
            f"Decode {-(-batch // count) * count} at once, or use {math.gcd(batch, count)} there "
            "and the other devices for another axis."
        )
    usual = (config.num_kv_heads, config.head_dim)
    has_heads = any(layer == (usual, usual) for layer in stored_by(config))
    often = repeats(config.num_kv_heads, shards(mesh, heads)) if has_heads else 1
    return NamedSharding(as_set(mesh), PartitionSpec(rows or None, heads or None)), often


def repeated_heads(stored: list[Stored], scales: Any, often: int) -> tuple[list[Stored], Any]:
    """What layers store, and their static scales, with each KV head `often` times."""
    if often == 1:
        return stored, scales

    def each(array: Any) -> Any:
        return None if array is None else jnp.repeat(jnp.asarray(array), often, axis=0)

    stored = [((k[0] * often, k[1]), (v[0] * often, v[1])) for k, v in stored]
    if scales is not None:
        scales = [None if one is None else jax.tree.map(each, one) for one in scales]
    return stored, scales
