"""Attention block by block with an online softmax, in plain XLA.

Temporary memory is a block of slots, whatever the length of the cache; blocks beyond the longest
sequence (and before the sliding window) are not read. Scales never touch the cache: per token they
multiply scores and probabilities, per channel or head the query and the output. On CPUs integer
codes may be read by 8-bit dots as they are, queries and probabilities split into int8 rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.cache_tensor import CacheTensor, join_planes
from fdq.ops.choice import Program, choose_program, trace_target
from fdq.ops.dots import exact_dot, join_rows, split_rows, sum_in_chains
from fdq.ops.implementation import Implementation
from fdq.ops.placement import in_auto_axes, spec_entries
from pallas_kernels.typing import Array, Float, Int

Decode = Callable[[jax.Array], list[jax.Array]]

_BLOCK = 256
_MASKED = -1e30  # finite: a block with no visible slot must not make NaN of inf - inf


@dataclasses.dataclass(frozen=True)
class AttentionArguments:
    """Checked arguments of `fdq.attention`, with nothing left out; see there."""

    q: jax.Array
    k: CacheTensor
    v: CacheTensor
    lengths: jax.Array
    offset: jax.Array
    sliding_window: int | None
    scale: float
    block_size: int | None = None

    def program(self) -> Program:
        """How the cache is read, so many slots at a time; see `fdq.ops.choice.Program`."""
        if trace_target().platform != "cpu":
            return Program("decoded", self.block_size or _BLOCK)
        rows = self.q.shape[1] * self.q.shape[2] // self.k.shape[1]
        path = f"attention {self.k.format.name}"
        chosen = choose_program(path, rows, self.k.shape[2], default="attention")
        return dataclasses.replace(chosen, size=self.block_size or chosen.size)


def attention_reference(
    q: Float[Array, "b t h d"],
    k: CacheTensor | Float[Array, "b kh s d"],
    v: CacheTensor | Float[Array, "b kh s d"],
    *,
    lengths: Int[Array, " b"],
    offset: Int[Array, " b"] | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Float[Array, "b t h d"]:
    """The meaning of `fdq.attention`: decode the cache, one softmax over all slots, float32."""
    t, h, d = q.shape[1:]
    keys, values = (
        a.dequantize() if isinstance(a, CacheTensor) else a.astype(jnp.float32) for a in (k, v)
    )
    keys, values = (jnp.repeat(a, h // a.shape[1], axis=1) for a in (keys, values))
    offset = lengths - t if offset is None else offset
    position = (offset[:, None] + jnp.arange(t)[None, :])[:, None, :, None]
    slot = jnp.arange(keys.shape[2])[None, None, None, :]
    visible = (slot <= position) & (slot < lengths[:, None, None, None])
    if sliding_window is not None:
        visible &= slot > position - sliding_window
    highest = lax.Precision.HIGHEST
    scores = jnp.einsum("bthd,bhsd->bhts", q.astype(jnp.float32), keys, precision=highest)
    scores = jnp.where(visible, scores * (d**-0.5 if scale is None else scale), _MASKED)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)
    out = jnp.einsum("bhts,bhsd->bthd", weights, values, precision=highest)
    return out.astype(q.dtype)


class Xla(Implementation[AttentionArguments]):
    """Everything: any device, shape and cache format."""

    name = "xla"

    def __call__(self, arguments: AttentionArguments) -> jax.Array:
        """Traced with Auto axes; the result is sharded like the queries."""
        a = arguments

        def attend(q, k, v, lengths, offset):
            return _attend(dataclasses.replace(a, q=q, k=k, v=v, lengths=lengths, offset=offset))

        arrays = (a.q, a.k, a.v, a.lengths, a.offset)
        return in_auto_axes(attend, *arrays, result=lambda: spec_entries(a.q))


def _attend(a: AttentionArguments) -> jax.Array:
    q, lengths, offset, sliding_window = a.q, a.lengths, a.offset, a.sliding_window
    program = a.program()
    key, value = (_Side(tensor, program.name) for tensor in (a.k, a.v))
    b, t, h, d = q.shape
    kh, slots = a.k.shape[1:3]
    group = h // kh
    block = min(program.size, slots)
    # [B, KH, T * G, D]: the queries of a KV head are the rows of one dot.
    queries = q.astype(jnp.float32) * jnp.float32(a.scale)
    queries = queries.reshape(b, t, kh, group, d).transpose(0, 2, 1, 3, 4)
    queries = queries.reshape(b, kh, t * group, d)
    position = offset[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :]
    position = jnp.repeat(position, group, axis=1, total_repeat_length=t * group)
    queries = key.scaled(queries)
    query_sum = jnp.sum(queries, axis=-1, keepdims=True)
    query_planes = [key.rows(queries[..., p :: key.planes]) for p in range(key.planes)]

    # A query sees slots from `lower` to before `upper`, [B, T * G].
    lower, first = jnp.zeros_like(position), jnp.int32(0)
    upper = jnp.minimum(position + 1, lengths[:, None])
    if sliding_window is not None:
        lower = position - (sliding_window - 1)
        first = jnp.maximum(jnp.min(offset) - (sliding_window - 1), 0) // block
    last = jnp.minimum((jnp.max(lengths) + (block - 1)) // block, -(-slots // block))

    def body(i, carry):
        largest, total, out = carry
        start = jnp.minimum(i * block, slots - block)
        slot = start + jnp.arange(block, dtype=jnp.int32)[None, None, :]
        # The last block starts early enough to be whole: slots seen before are masked.
        unseen = jnp.maximum(lower, i * block)
        visible = (slot >= unseen[..., None]) & (slot < upper[..., None])
        scores = key.dots(query_planes, start, block)
        scores = key.finish_scores(scores, query_sum, start, block)
        scores = jnp.where(visible[:, None], scores, jnp.float32(_MASKED))
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        # A row that has seen nothing yet: exp(_MASKED - 0) is 0, exp(_MASKED - _MASKED) is not.
        seen = jnp.where(new_largest == jnp.float32(_MASKED), jnp.float32(0), new_largest)
        weights = jnp.exp(scores - seen)
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
    out = value.scaled(join_planes(out) / jnp.where(total == 0, jnp.float32(1), total))
    if value.static_zero is not None:
        seen = (total > 0).astype(jnp.float32)
        out = out - seen * value.static_zero_output()
    out = out.reshape(b, kh, t, group, d).transpose(0, 2, 1, 3, 4)
    return out.reshape(b, t, h, d).astype(q.dtype)


# With as many queries the cost of turning their scores is more than that of repacking keys.
_FEW_ROWS = 64


def _batched_dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """`[B, KH, R, C]` times `y [B, KH, ., .]` over C, which is `axis` of y; int8 -> int32."""
    wanted = jnp.int32 if y.dtype == jnp.int8 else jnp.float32
    dot = functools.partial(
        lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=wanted
    )
    if axis == 3 and x.shape[2] <= _FEW_ROWS and trace_target().platform == "cpu":
        # Keys lie as a left operand wants them; XLA would turn them to the right, and repack them.
        scores = dot(y, x, (((3,), (3,)), ((0, 1), (0, 1))))
        return jnp.swapaxes(lax.optimization_barrier(scores), 2, 3)
    return dot(x, y, (((3,), (axis,)), ((0, 1), (0, 1))))


# Floats of a vector register of AVX2, and slots that are summed before anything is written.
_LANES = 8
_SUMMED_SLOTS = 16


def _lane_scores(rows: list[jax.Array], codes: jax.Array, decode: Decode) -> jax.Array:
    """`[B, KH, R, C]` times what `codes [B, KH, S, C]` decode to, over C, summed over planes.

    One element-wise fusion decodes keys in registers and leaves a sum for each lane; XLA's own sum
    over them would take longer than a dot with ones.
    """
    b, kh, r, _ = rows[0].shape
    slots = codes.shape[2]
    parts = [lax.optimization_barrier(x).reshape(b, kh, r, 1, -1, _LANES) for x in rows]
    codes = codes.reshape(b, kh, 1, slots, -1, _LANES)
    # Decoded after it is cut: XLA would write what several products have in common.
    products = [
        x[..., i, :] * y
        for i in range(codes.shape[4])
        for x, y in zip(parts, decode(codes[..., i, :]), strict=True)
    ]
    lanes = lax.optimization_barrier(sum_in_chains(products)).reshape(-1, _LANES)
    scores = exact_dot(lanes, jnp.ones((_LANES, 1), jnp.float32))
    return scores.reshape(b, kh, r, slots)


def _lane_sums(weights: jax.Array, codes: jax.Array, decode: Decode) -> list[jax.Array]:
    """`[B, KH, R, S]` times what `codes [B, KH, S, C]` decode to, over S, a result a plane."""
    b, kh, r, slots = weights.shape
    block = math.gcd(slots, _SUMMED_SLOTS)
    w = weights.reshape(b, kh, r, slots // block, block)
    w = lax.optimization_barrier(w.transpose(0, 1, 3, 4, 2))[..., None]
    codes = codes.reshape(b, kh, slots // block, block, 1, -1)
    ones = jnp.ones((b, kh, 1, slots // block), jnp.float32)

    def summed(values: tuple[jax.Array, ...]) -> jax.Array:
        products = [w[:, :, :, j] * value for j, value in enumerate(values)]
        total = lax.optimization_barrier(sum_in_chains(products))
        total = total.reshape(b, kh, slots // block, -1)
        return _batched_dot(ones, total, 2).reshape(b, kh, r, -1)

    # Of each slot of a block, as in `_lane_scores`; then of each plane.
    decoded = [decode(codes[:, :, :, j]) for j in range(block)]
    return [summed(values) for values in zip(*decoded, strict=True)]


class _Side:
    """Keys or values, with the scales that are folded into what they are multiplied with."""

    def __init__(self, tensor: CacheTensor, program: str):
        self.tensor = tensor
        has_integers = tensor.format.integer_planes(tensor.codes[:0]) is not None
        self.split = program == "integers" and has_integers
        self.lanes = program == "lanes"
        self.planes = tensor.format.planes
        scale, zero = tensor.scale, tensor.zero
        self.token_scale, self.token_zero = (scale, zero) if tensor.dynamic else (None, None)
        wide = (
            None if a is None or tensor.dynamic else tensor.over_channels(a) for a in (scale, zero)
        )
        self.static_scale, self.static_zero = wide

    def _codes(self, start, size) -> jax.Array:
        codes = _cut(self.tensor.codes, start, size)
        # XLA has no vector instructions for a fusion that cuts out of the cache itself.
        return lax.optimization_barrier(codes) if self.lanes else codes

    def block(self, start, size) -> list[jax.Array]:
        """`[B, KH, size, D / planes]` code values of a block of slots, int8 or float32."""
        codes = self._codes(start, size)
        if self.split:
            planes = self.tensor.format.integer_planes(codes)
            assert planes is not None
            return planes
        return self.tensor.format.decode_planes(codes)

    def rows(self, x: jax.Array) -> Any:
        """What `[B, KH, R, C]` floats are multiplied as: themselves, or int8 rows and steps."""
        if not self.split:
            return x
        # Without the barriers XLA computes again what made x for each part of it.
        return lax.optimization_barrier(split_rows(lax.optimization_barrier(x), axis=2))

    def _dot(self, rows: Any, plane: jax.Array, axis: int) -> jax.Array:
        if not self.split:
            return _batched_dot(rows, plane, axis)
        codes, step = rows
        sums = lax.optimization_barrier(_batched_dot(codes, plane, axis))
        return join_rows(sums, axis=2) * step

    def dots(self, rows: list[Any], start, size) -> jax.Array:
        """`[B, KH, R, size]`: queries, as `rows` made them of each plane, times a block."""
        if self.lanes and self.tensor.codes.shape[3] % _LANES == 0:
            return _lane_scores(rows, self._codes(start, size), self.tensor.format.decode_planes)
        planes = zip(rows, self.block(start, size), strict=True)
        return functools.reduce(jnp.add, [self._dot(a, b, 3) for a, b in planes])

    def scaled(self, x: jax.Array) -> jax.Array:
        """Queries or the output, times static scales."""
        return x if self.static_scale is None else x * self.static_scale

    def finish_scores(self, scores, query_sum, start, size) -> jax.Array:
        if self.token_scale is None:
            # A static zero point adds the same to all scores of a query: the softmax removes it.
            return scores
        if self.token_zero is not None:
            scores = scores - query_sum * _of_slots(self.token_zero, start, size)
        return scores * _of_slots(self.token_scale, start, size)

    def weighted_sum(self, weights, start, size) -> list[jax.Array]:
        """`[B, KH, R, D / planes]` sums of values over a block of slots."""
        if self.token_scale is not None:
            weights = weights * _of_slots(self.token_scale, start, size)
        if self.lanes and size % _LANES == 0:
            codes = self._codes(start, size)
            sums = _lane_sums(weights, codes, self.tensor.format.decode_planes)
        else:
            rows = self.rows(weights)
            sums = [self._dot(rows, plane, 2) for plane in self.block(start, size)]
        if self.token_zero is None:
            return sums
        zero = _of_slots(self.token_zero, start, size)
        shift = jnp.sum(weights * zero, axis=-1, keepdims=True)
        return [s - shift for s in sums]

    def static_zero_output(self) -> jax.Array:
        """`[1, KH, 1, D or 1]`: what zero points add to an output whose weights sum to one."""
        assert self.static_zero is not None and self.static_scale is not None
        return self.static_zero * self.static_scale


def _cut(a: jax.Array, start: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, start, size, axis=2)


def _of_slots(a: jax.Array, start: Any, size: int) -> jax.Array:
    """Scales or zero points of a block of slots, float32 `[B, KH, 1, size]`."""
    return _cut(a, start, size).astype(jnp.float32)[:, :, None, :]
