"""Indices of sequences, checked as far as their values are known, and what caches have there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def batch_rows(rows: Any, batch: int, *, ndim: int | None = None) -> jax.Array:
    """Indices of sequences as int32, `[N]` or, without `ndim`, one.

    Raises:
      ValueError: what are no integers, another rank, or none of the batch where values are known.
    """
    found = rows if isinstance(rows, Tracer) else np.asarray(rows)
    if found.size and not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"rows: expected integers, found {found.dtype}.")
    if found.ndim > 1 or ndim not in (None, found.ndim):
        raise ValueError(f"rows: expected a list of rows, found {found.ndim} axes.")
    if isinstance(found, Tracer):
        return found.astype(jnp.int32)
    if found.size and (found.min() < 0 or found.max() >= batch):
        raise ValueError(f"rows: expected 0 to {batch - 1}, found {found.tolist()}.")
    return jnp.asarray(found, jnp.int32)


def taken[Cache: Any](cache: Cache, rows: jax.Array) -> Cache:
    """The sequences `rows`, [N] int32, of a `KVCache`."""
    layers = (layer._replace(k=layer.k.take(rows), v=layer.v.take(rows)) for layer in cache.layers)
    reach = None if cache.reach is None else cache.reach[rows]
    return dataclasses.replace(cache, layers=tuple(layers), length=cache.length[rows], reach=reach)


def inserted[Cache: Any](cache: Cache, rows: jax.Array, other: Cache) -> Cache:
    """A `KVCache` with the sequences of `other` in place of `rows`, [N] int32."""
    layers = tuple(
        mine._replace(k=mine.k.insert(rows, theirs.k), v=mine.v.insert(rows, theirs.v))
        for mine, theirs in zip(cache.layers, other.layers, strict=True)
    )
    reach = cache.reach
    if reach is not None:
        reach = reach.at[rows].set(other.length if other.reach is None else other.reach)
    length = cache.length.at[rows].set(other.length)
    return dataclasses.replace(cache, layers=layers, length=length, reach=reach)
