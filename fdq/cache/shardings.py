"""How a cache lies on a mesh: its scales are cut as the keys and values that they go with."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from fdq.cache.cache_tensor import CacheTensor


def parts(sharding: NamedSharding | None, heads: int) -> int:
    """Into how many parts of their own keys and values are cut; a single head is not.

    Raises:
      ValueError: what is no NamedSharding of four axes at most.
    """
    if sharding is None:
        return 1
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) > 4:
        raise ValueError(
            f"KV cache sharding: expected a NamedSharding of [batch, kv_heads, slots, head_dim], "
            f"found {sharding}."
        )
    entries = [entry for i, entry in enumerate(sharding.spec) if i != 1 or heads > 1]
    names = [name for entry in entries for name in _names(entry)]
    return math.prod(sharding.mesh.shape[name] for name in names)


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def partition(tensor: CacheTensor, *entries: Any) -> CacheTensor:
    """A CacheTensor of PartitionSpecs, from the entries of `[batch, kv_heads, slots, head_dim]`.

    An abstract one says which arrays there are.
    """
    batch, by_head, slots, channels = (*entries, *[None] * (4 - len(entries)))
    names = {"b": batch, "h": by_head, "s": slots, "d": channels, "-": None}

    def one(axes: str, array: Any) -> PartitionSpec:
        # A single head or number is not cut.
        whole = [axis in "hd" and n == 1 for axis, n in zip(axes, array.shape, strict=True)]
        return PartitionSpec(*(None if w else names[a] for a, w in zip(axes, whole, strict=True)))

    return jax.tree.map(one, tensor.axes(), tensor)
