"""Several tokens at once beside a ring: what they see, and the write; see `fdq.cache.ring`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fdq.cache.cache_tensor import CacheTensor
from fdq.ops.placement import in_auto_axes, spec_entries


def unrolled(
    ring: CacheTensor, new: CacheTensor, first: jax.Array
) -> tuple[CacheTensor, jax.Array]:
    """What T new tokens see in one row: the window before them, then themselves.

    Args:
      ring: `[B, KH, S, D]`, without the new tokens.
      new: they as the ring stores them, T slots.
      first: [B] int32, the position of the first.

    Returns:
      A CacheTensor of `window - 1 + T` slots that is no ring, and [B] int32, where in it the new
      tokens begin. What comes after them is none of anybody's.
    """
    assert ring.window is not None
    t, slots = new.codes.shape[2], ring.codes.shape[2]
    begin = jnp.maximum(first - (ring.window - 1), 0)
    before = first - begin
    at = jnp.arange(ring.window - 1 + t, dtype=jnp.int32)[None]
    old = (begin[:, None] + at) % slots
    later = jnp.clip(at - before[:, None], 0, t - 1)

    is_new = at >= before[:, None]

    def joined(stored: jax.Array, new: jax.Array, *index: jax.Array) -> jax.Array:
        is_new, later, old = index
        return jnp.where(_along(is_new, stored), _slots(new, later), _slots(stored, old))

    index = is_new, later, old
    arrays = {name: _placed(joined, *pair, *index) for name, *pair in _of_tokens(ring, new)}
    return ring.replace(**arrays, window=None), before


def write_ring(ring: CacheTensor, new: CacheTensor, first: jax.Array, ends: Any) -> CacheTensor:
    """The ring with `new`, T tokens from position `first [B]` on, but for those from `ends [B]` on.

    Of more tokens than it has slots the last ones stay.
    """
    t, slots = new.codes.shape[2], ring.codes.shape[2]
    last = first + (t - 1) if ends is None else jnp.minimum(first + (t - 1), ends - 1)
    # The highest position of each slot that is not after the last.
    holds = last[:, None] - (last[:, None] - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    index = holds - first[:, None]

    def written(stored: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.where(_along(index >= 0, stored), _slots(new, jnp.clip(index, 0, t - 1)), stored)

    arrays = {name: _placed(written, *pair, index) for name, *pair in _of_tokens(ring, new)}
    return ring.replace(**arrays)


def _of_tokens(ring: CacheTensor, new: CacheTensor) -> Iterator[tuple[str, jax.Array, jax.Array]]:
    """Names and both arrays of what belongs to tokens; calibrated scales do not."""
    for name in ("codes", "scale", "zero") if ring.dynamic else ("codes",):
        if (stored := getattr(ring, name)) is not None:
            yield name, stored, getattr(new, name)


def _placed(function: Any, stored: jax.Array, *others: jax.Array) -> jax.Array:
    return in_auto_axes(function, stored, *others, result=lambda: spec_entries(stored))


def _slots(a: jax.Array, index: jax.Array) -> jax.Array:
    """`a [B, KH, S, ...]` at slots `index [B, N]`, which are in range."""
    return jax.vmap(lambda one, at: jnp.take(one, at, axis=1, mode="clip"))(a, index)


def _along(mask: jax.Array, a: jax.Array) -> jax.Array:
    """`mask [B, N]` against `[B, KH, N, ...]`."""
    return mask[:, None, :, None] if a.ndim == 4 else mask[:, None, :]
