"""What queries see of their own block of a `BlockTensor`, as it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.block_tensor import BLOCK, BlockTensor
from fdq.cache.cache_tensor import CacheTensor

_MASKED = -1e30
State = tuple[jax.Array, jax.Array, list[jax.Array]]
"""Largest score and total weight `[B, KH, rows, 1]`, and weighted sums, one for each plane."""


def open_parts(k: Any, v: CacheTensor) -> tuple[list[BlockTensor], BlockTensor] | None:
    """Keys, in one or several parts, and values that have open blocks; None where there are none.

    Raises:
      ValueError: some have and some have not.
    """
    parts = [k] if isinstance(k, CacheTensor) else list(k.parts)
    keys = [part for part in parts if isinstance(part, BlockTensor)]
    if not keys and not isinstance(v, BlockTensor):
        return None
    if len(keys) < len(parts) or not isinstance(v, BlockTensor):
        specs = ", ".join(str(part.spec) for part in (*parts, v))
        raise ValueError(f"attention: keys and values in blocks go together, found {specs}.")
    return keys, v


def start_with(
    exact: tuple[list[BlockTensor], BlockTensor], state: State, queries: jax.Array, a: Any
) -> State:
    """`state` after the own blocks of queries `[B, KH, T * G, D]`, float32 and scaled.

    `a` are the arguments of attention. Rows of a block meet 32 slots each, whatever T is.
    """
    keys, values = exact
    t = a.q.shape[1]
    if t > 1 and values.recent is None:
        raise ValueError(
            f"attention: {t} queries over a {values.spec} cache: write their keys and values "
            "first, and attend to what that returns."
        )
    b, kh, rows, _ = queries.shape
    recent, first = _recent(keys, values)
    k = jnp.concatenate([one for one, _ in recent[:-1]], axis=-1)
    v = recent[-1][0]
    if t == 1:  # one block, whichever it is
        q, position = queries[:, :, None], a.offset[:, None, None]
    else:
        # Queries of a block side by side: as many slots later as their block began before them.
        shift = a.offset - first * BLOCK
        group = rows // t
        wide = jnp.zeros((b, kh, k.shape[2] * BLOCK, group, queries.shape[3]), jnp.float32)
        split = queries.reshape(b, kh, t, group, -1)
        into = jax.vmap(lambda w, x, at: lax.dynamic_update_slice_in_dim(w, x, at, axis=1))
        q = into(wide, split, shift).reshape(b, kh, k.shape[2], BLOCK * group, -1)
        within = jnp.arange(k.shape[2] * BLOCK, dtype=jnp.int32).reshape(1, k.shape[2], BLOCK)
        position = first[:, None, None] * BLOCK + jnp.repeat(within, group, axis=2)
    slot = first[:, None] * BLOCK + jnp.arange(k.shape[2] * BLOCK, dtype=jnp.int32)[None]
    slot = slot.reshape(b, -1, 1, BLOCK)
    at = position[..., None]
    visible = (slot <= at) & (slot >= at // BLOCK * BLOCK) & (slot < a.lengths[:, None, None, None])
    if a.sliding_window is not None:
        visible &= slot > at - a.sliding_window
    visible = visible[:, None]

    narrow = a.narrow()

    def dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
        x, y = (x, y) if narrow is None else (x.astype(narrow), y.astype(narrow))
        contracted = (((4,), (axis,)), ((0, 1, 2), (0, 1, 2)))
        highest = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return lax.dot_general(x, y, contracted, highest, preferred_element_type=jnp.float32)

    scores = dot(q, k, 4)
    if a.softcap is not None:
        scores = a.softcap * jnp.tanh(scores / a.softcap)
    largest = jnp.max(jnp.where(visible, scores, _MASKED), axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(jnp.minimum(scores - largest, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = dot(weights, v, 3)

    def of_rows(x: jax.Array) -> jax.Array:
        if t == 1:
            return x[:, :, 0]
        x = x.reshape(b, kh, k.shape[2] * BLOCK, rows // t, -1)
        cut = jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, t, axis=1))
        return cut(x, a.offset - first * BLOCK).reshape(b, kh, rows, -1)

    largest, total, out = map(of_rows, (largest, total, out))
    before, sums, planes = state
    most = jnp.maximum(before, largest)
    shrink, more = jnp.exp(before - most), jnp.exp(largest - most)
    step = len(planes)
    planes = [o * shrink + out[..., p::step] * more for p, o in enumerate(planes)]
    return most, sums * shrink + total * more, planes


def _recent(keys: list[BlockTensor], values: BlockTensor) -> tuple[list[Any], jax.Array]:
    """Blocks that were written last `[B, KH, n, 32, D]` float32 of all, and the first of them [B].

    Without a write just before, that is the open block.
    """
    found, first = [], values.block
    for tensor in (*keys, values):
        blocks = tensor.open if tensor.recent is None else tensor.recent
        first = tensor.block if tensor.first is None else tensor.first
        b, heads, _, d = blocks.shape
        found.append((blocks.astype(jnp.float32).reshape(b, heads, -1, BLOCK, d), first))
    return found, first
