"""Causal attention over a KV cache, quantized or not, block by block with an online softmax.

Temporary memory is a block of slots, whatever the length of the cache; blocks beyond the longest
sequence (and before the sliding window) are not read. Scales never touch the cache: per token they
multiply scores and probabilities, per channel or head the query and the output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.codes import cache_code_planes, dequantize_cache, join_planes
from fdq.ops import mosaic_gpu
from fdq.ops.choice import resolve_implementation
from fdq.ops.explicit_axes import in_auto_axes, spec_entry
from fdq.schemes.scheme import CacheSpec

DEFAULT_BLOCK = 256
_MASKED = -1e30  # finite: a block with no visible slot must not make NaN of inf - inf


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    offset: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    k_zero: jax.Array | None = None,
    v_zero: jax.Array | None = None,
    cache_format: CacheSpec | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
    block_size: int = DEFAULT_BLOCK,
    implementation: str | None = None,
) -> jax.Array:
    """Each query attends to the slots up to its own position.

    Query t of sequence b stands at slot ``offset[b] + t`` and sees slots ``s`` with
    ``s <= offset[b] + t``, ``s < lengths[b]`` and, with a window, ``s > offset[b] + t - window``.
    Write the new keys and values to the cache first, then attend.

    Args:
      q: float ``[B, T, H, D]``, after the rotation.
      k: ``[B, KH, S, D]``: floats, or the codes of ``quantize_cache`` (int4: ``D / 2`` bytes);
        head h reads KV head ``h // (H / KH)``.
      v: as k.
      lengths: int32 ``[B]``, valid slots, those of this chunk included.
      offset: int32 ``[B]``, slot of the first query; ``lengths - T`` if None.
      k_scale: ``[B, KH, S]`` per token, ``[KH, D]`` or ``[KH, 1]`` static; None for floats.
      v_scale: as k_scale.
      k_zero: zero points, of the shape of k_scale; int4 only.
      v_zero: as k_zero.
      cache_format: what the codes are; None for floats.
      sliding_window: slots a query sees, its own included; None for all.
      scale: multiplies the scores; ``D ** -0.5`` if None.
      block_size: slots read at a time.
      implementation: as in ``matmul``.

    Returns:
      ``[B, T, H, D]`` in the dtype of q; scores, softmax and sums are float32. A query that sees
      no slot gets zeros.
    """
    request = resolve_implementation("attention", implementation)
    _check(q, k, v, cache_format, k_scale, v_scale, k_zero, v_zero)
    lengths = lengths.astype(jnp.int32)
    offset = lengths - q.shape[1] if offset is None else offset.astype(jnp.int32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mosaic_gpu.use_attention(request, q, k, cache_format):
        return mosaic_gpu.decode_attention(
            q,
            k,
            v,
            lengths=jnp.minimum(lengths, offset + 1),
            cache_format=cache_format,
            k_scale=k_scale,
            v_scale=v_scale,
            k_zero=k_zero,
            v_zero=v_zero,
            sliding_window=sliding_window,
            scale=scale,
        )

    def attend(q, key, value, lengths, offset):
        return _attend(q, key, value, lengths, offset, sliding_window, scale, block_size)

    key = _Side(k, k_scale, k_zero, cache_format)
    value = _Side(v, v_scale, v_zero, cache_format)
    result = [spec_entry(q, axis) for axis in range(4)]
    return in_auto_axes(attend, q, key, value, lengths, offset, result=lambda: result)


def _attend(q, key: _Side, value: _Side, lengths, offset, sliding_window, scale, block_size):
    b, t, h, d = q.shape
    kh, slots = key.codes.shape[1], key.codes.shape[2]
    group = h // kh
    block = min(block_size, slots)
    # [B, KH, T * G, D]: the queries of a KV head are the rows of one dot.
    queries = q.astype(jnp.float32) * jnp.float32(scale)
    queries = queries.reshape(b, t, kh, group, d).transpose(0, 2, 1, 3, 4)
    queries = queries.reshape(b, kh, t * group, d)
    position = offset[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :]
    position = jnp.repeat(position, group, axis=1, total_repeat_length=t * group)
    queries = key.scale_queries(queries)
    query_sum = jnp.sum(queries, axis=-1, keepdims=True)
    query_planes = [queries[..., p :: key.planes] for p in range(key.planes)]

    first = jnp.int32(0)
    if sliding_window is not None:
        first = jnp.maximum(jnp.min(offset) - (sliding_window - 1), 0) // block
    last = jnp.minimum((jnp.max(lengths) + (block - 1)) // block, -(-slots // block))

    def body(i, carry):
        largest, total, out = carry
        start = jnp.minimum(i * block, slots - block)
        slot = start + jnp.arange(block, dtype=jnp.int32)
        # The last block starts early enough to be whole: slots seen before are masked.
        visible = (slot >= i * block)[None, None, :] & (slot[None, None, :] <= position[:, :, None])
        visible &= slot[None, None, :] < lengths[:, None, None]
        if sliding_window is not None:
            visible &= slot[None, None, :] > position[:, :, None] - sliding_window
        scores = _sum_dots(query_planes, key.block(start, block))
        scores = key.finish_scores(scores, query_sum, start, block)
        scores = jnp.where(visible[:, None], scores, jnp.float32(_MASKED))
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(visible[:, None], jnp.exp(scores - new_largest), jnp.float32(0))
        shrink = jnp.exp(largest - new_largest)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        update = value.weighted_sum(weights, start, block)
        out = [o * shrink + u for o, u in zip(out, update, strict=True)]
        return new_largest, total, out

    rows = (b, kh, t * group)
    start_state = (
        jnp.full((*rows, 1), _MASKED, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
        [jnp.zeros((*rows, d // value.planes), jnp.float32) for _ in range(value.planes)],
    )
    _, total, out = lax.fori_loop(first, last, body, start_state)
    out = value.scale_output(join_planes(out) / jnp.where(total == 0, jnp.float32(1), total))
    if value.static_zero is not None:
        seen = (total > 0).astype(jnp.float32)
        out = out - seen * value.static_zero_output()
    out = out.reshape(b, kh, t, group, d).transpose(0, 2, 1, 3, 4)
    return out.reshape(b, t, h, d).astype(q.dtype)


def _batched_dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """``[B, KH, R, C]`` times ``y [B, KH, ., .]`` over C, which is ``axis`` of y."""
    return lax.dot_general(
        x,
        y,
        (((3,), (axis,)), ((0, 1), (0, 1))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _sum_dots(x: list[jax.Array], y: list[jax.Array]) -> jax.Array:
    """``[B, KH, R, S]``: queries times keys, over the channels of every plane."""
    scores = _batched_dot(x[0], y[0], 3)
    for a, b in zip(x[1:], y[1:], strict=True):
        scores = scores + _batched_dot(a, b, 3)
    return scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Side:
    """Keys or values: codes with the scales that are folded into what they are multiplied with."""

    codes: jax.Array
    scale: jax.Array | None
    zero: jax.Array | None
    spec: CacheSpec | None = dataclasses.field(metadata={"static": True})

    @property
    def token_scale(self) -> jax.Array | None:
        return None if self.scale is None or self.scale.ndim == 2 else self.scale

    @property
    def static_scale(self) -> jax.Array | None:
        return None if self.scale is None or self.scale.ndim == 3 else _wide(self.scale)

    @property
    def token_zero(self) -> jax.Array | None:
        return None if self.zero is None or self.zero.ndim == 2 else self.zero

    @property
    def static_zero(self) -> jax.Array | None:
        return None if self.zero is None or self.zero.ndim == 3 else _wide(self.zero)

    @property
    def planes(self) -> int:
        """Arrays that a block of codes is decoded to (int4: even and odd channels)."""
        return 2 if self.spec is not None and self.spec.format == "int4" else 1

    def block(self, start, size) -> list[jax.Array]:
        """float32 ``[B, KH, size, D / planes]`` code values of a block of slots."""
        return cache_code_planes(_cut(self.codes, start, size), self.spec)

    def scale_queries(self, queries: jax.Array) -> jax.Array:
        return queries if self.static_scale is None else queries * self.static_scale

    def finish_scores(self, scores, query_sum, start, size) -> jax.Array:
        if self.token_scale is not None:
            if self.token_zero is not None:
                zero = _cut(self.token_zero, start, size).astype(jnp.float32)
                scores = scores - query_sum * zero[:, :, None, :]
            return scores * _cut(self.token_scale, start, size).astype(jnp.float32)[:, :, None, :]
        # A static zero point adds the same to all scores of a query: the softmax removes it.
        return scores

    def weighted_sum(self, weights, start, size) -> list[jax.Array]:
        """``[B, KH, R, D / planes]`` sums of values over a block of slots."""
        block = self.block(start, size)
        if self.token_scale is None:
            return [_batched_dot(weights, plane, 2) for plane in block]
        scale = _cut(self.token_scale, start, size).astype(jnp.float32)
        weights = weights * scale[:, :, None, :]
        sums = [_batched_dot(weights, plane, 2) for plane in block]
        if self.token_zero is not None:
            zero = _cut(self.token_zero, start, size).astype(jnp.float32)
            shift = jnp.sum(weights * zero[:, :, None, :], axis=-1, keepdims=True)
            sums = [s - shift for s in sums]
        return sums

    def scale_output(self, out: jax.Array) -> jax.Array:
        return out if self.static_scale is None else out * self.static_scale

    def static_zero_output(self) -> jax.Array:
        """``[1, KH, 1, D or 1]``: what zero points add to an output whose weights sum to one."""
        assert self.static_zero is not None and self.static_scale is not None
        return self.static_zero * self.static_scale


def _wide(a: jax.Array) -> jax.Array:
    return a.astype(jnp.float32)[None, :, None, :]


def _cut(a: jax.Array, start: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, start, size, axis=2)


def _check(q, k, v, spec, *small) -> None:
    b, _, h, d = q.shape
    width = d // 2 if spec is not None and spec.format == "int4" else d
    expected = (b, k.shape[1], k.shape[2], width)
    if k.shape != expected or v.shape != expected or h % k.shape[1]:
        raise ValueError(
            f"attention: q {q.shape} needs k and v [B, KH, S, {width}] with KH dividing H={h}, "
            f"found k {k.shape} and v {v.shape}."
        )
    if (spec is None) != all(a is None for a in small[:2]):
        raise ValueError(
            f"attention: cache_format is {spec}; scales go with a quantized format and only there."
        )


def attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    offset: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    k_zero: jax.Array | None = None,
    v_zero: jax.Array | None = None,
    cache_format: CacheSpec | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The meaning of ``attention``: decode the cache, one softmax over all slots, float32."""
    t, h, d = q.shape[1:]
    keys = dequantize_cache(k, cache_format, k_scale, k_zero)
    values = dequantize_cache(v, cache_format, v_scale, v_zero)
    keys = jnp.repeat(keys, h // k.shape[1], axis=1)
    values = jnp.repeat(values, h // k.shape[1], axis=1)
    offset = lengths - t if offset is None else offset
    position = (offset[:, None] + jnp.arange(t)[None, :])[:, None, :, None]
    slot = jnp.arange(k.shape[2])[None, None, None, :]
    visible = (slot <= position) & (slot < lengths[:, None, None, None])
    if sliding_window is not None:
        visible &= slot > position - sliding_window
    highest = lax.Precision.HIGHEST
    scores = jnp.einsum("bthd,bhsd->bhts", q.astype(jnp.float32), keys, precision=highest)
    scores = jnp.where(visible, scores * (d**-0.5 if scale is None else scale), -jnp.inf)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)
    out = jnp.einsum("bhts,bhsd->bthd", weights, values, precision=highest)
    return out.astype(q.dtype)
