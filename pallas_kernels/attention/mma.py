"""Decode attention on tensor cores (`mma.sync`, sm_80 and newer) for query groups up to 16.

A program is four warps with one (sequence, KV head), all query heads of its group (8 or 16 columns
of the tensor cores) and a part of the sequence. Each warp takes 16 slots of a tile of 64 and keeps
an online softmax and sums of its own, so that warps exchange nothing until the end.

Codes become exact 16-bit floats (float16; a bfloat16 cache stays bfloat16). Queries and
probabilities are the sum of two such floats, high and low, which costs a second product and keeps
the result within 2^-16 (bfloat16) or 2^-21 of float32 products. Scales of a value's token are not
multiplied to probabilities, whose float16 would underflow, but enter the exponent: with
`w = p * v_scale`, the largest w of a warp is scaled to 2^14, and the denominator sums
`w / v_scale`.

In the interpreter, products are `jax.numpy` dots of the same numbers (see `mma_fragments`); the
rest is the same program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.attention.cuda_cores import LOG2_E, MASKED
from pallas_kernels.attention.parts import (
    AttentionShape,
    cache_operands,
    choose_parts,
    exponent,
    launch_parts,
    rows_of_threads,
    spread,
    write_output,
)
from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.cache.words import CacheWords
from pallas_kernels.mosaic import mma_fragments as mma
from pallas_kernels.mosaic.launch import load, store
from pallas_kernels.mosaic.mma_codes import CODES, Codes

MOST_HEADS = 16
"""Query heads of a KV head that one program holds."""

_TERMS = 2
_QUERY_EXPONENT = 10  # of the largest number of a program's queries, as float16 terms
_LEAST_SCALE = 2.0**-64  # of a token's values
_HEADROOM = 14.0  # log2 of the largest probability as a float16, which ends at 65504


def supports(side: CacheWords, group: int, slots: int) -> bool:
    """Whether this file has a kernel for a cache, a query group and a number of slots."""
    columns = 8 if group <= 8 else 16
    fits = group <= MOST_HEADS and columns * side.head_dim <= 2048  # sums, in registers
    return _kind(side) in CODES and fits and slots >= mma.SLOTS


def _kind(side: CacheWords) -> str:
    """The name in `CODES`, which may not be there: a float32 cache, a format of somebody else's."""
    return side.format or side.dtype.name


@dataclasses.dataclass(frozen=True)
class _Shape(AttentionShape):
    """Of a launch that multiplies `codes`; `k_scale_width` is the last axis of a scale."""

    codes: Codes
    k_scale_width: int | None

    @property
    def columns(self) -> int:
        """Columns of the tensor cores: the group, padded."""
        return -(-self.group // 8) * 8

    @property
    def lifted(self) -> bool:
        """Whether queries carry scales of channels."""
        return self.side.static and self.k_scale_width != 1

    @property
    def factor(self) -> float:
        """What products of queries and codes are multiplied by, beside the cache's scales."""
        return self.scale * LOG2_E / self.codes.shift

    @property
    def unrolled(self) -> int:
        """Tiles in flight: about 64 bytes of keys a thread, fewer with 16 columns."""
        tiles = 64 // self.codes.width if self.columns == 8 else 32 // self.codes.width
        return max(1, min(tiles, 4, self.slots // mma.SLOTS))

    @property
    def tile(self) -> int:
        """Slots that a program reads at a time."""
        return self.unrolled * mma.SLOTS


@functools.partial(jax.jit, static_argnames=("side", "sliding_window", "scale", "parts"))
def attend(
    q: jax.Array,
    k: CacheArrays,
    v: CacheArrays,
    lengths: jax.Array,
    *,
    side: CacheWords,
    sliding_window: int | None,
    scale: float,
    parts: int | None,
) -> jax.Array:
    """`decode_attention` by the kernel of this file; arguments as there, and checked there."""
    b, h, d = q.shape
    kv_heads, slots = k.codes.shape[1:3]
    group = h // kv_heads
    codes = CODES[_kind(side)](d)
    if parts is None:
        parts = choose_parts(b * kv_heads, slots, resident(codes, group))
    width = None if k.scale is None else k.scale.shape[-1]
    shape = _Shape(
        kv_heads, slots, group, parts, side, sliding_window, scale, q.dtype, codes, width
    )
    # Sums come out in the order of channels.
    order = dataclasses.replace(side, natural=True)
    operands, static = cache_operands(order, k, v)
    words = {"k": _words(k.codes, codes), "v": _words(v.codes, codes)}
    columns = shape.columns
    return launch_parts(
        functools.partial(_program, shape, order),
        operands | words | {"q": q, "lengths": lengths},
        static,
        shape,
        order,
        name="decode_attention_mma_kernel",
        grid={"part": parts, "sequence": b * kv_heads},
        scratch_types=(
            mg.SMEM((columns, d), jnp.float32),
            mg.SMEM((d, columns), jnp.float32),
            mg.SMEM((columns,), jnp.float32),
            mg.SMEM((columns,), jnp.int32),
        ),
    )


def resident(codes: Codes, group: int) -> int:
    """Programs that registers allow on a multiprocessor, with `group` query heads a KV head."""
    return 2 if group > 8 or codes.per_word == 8 else 3


def _words(array: jax.Array, codes: Codes) -> jax.Array:
    """`[B, KH, S, W]` int32."""
    words = array.reshape(*array.shape[:-1], codes.width, 4 // array.dtype.itemsize)
    return lax.bitcast_convert_type(words, jnp.int32)


def _program(
    shape: _Shape, order: CacheWords, inputs, outputs, query_ref, sums_ref, totals_ref, tops_ref
) -> None:
    """One program: the query heads of one KV head, one part of a sequence."""
    side, codes, columns, tile = shape.side, shape.codes, shape.columns, shape.tile
    d = codes.head_dim
    scores_in = mma.score_layout()
    row = scores_in.reduce(1)
    value_row = mma.value_layout(codes).reduce(1)
    b = lax.axis_index("sequence") // shape.kv_heads
    kv = lax.axis_index("sequence") % shape.kv_heads
    part = lax.axis_index("part")
    first, end = shape.part_bounds(inputs["lengths"][b], part, tile)
    tiles = jnp.maximum(end - first + (tile - 1), 0) // tile
    queries, query_scale = _load_queries(shape, inputs, b, kv, query_ref)
    rows = mg.broadcasted_iota(jnp.int32, (mma.SLOTS,), 0, layout=row)
    factor = jnp.float32(shape.factor) * query_scale
    if side.static and not shape.lifted:
        factor = factor * inputs["k_scale"][kv, 0]
    zeros = side.dynamic and side.has_zero

    def across(x):  # [64] -> [64, columns]
        return mg.layout_cast(lax.broadcast_in_dim(x, (mma.SLOTS, columns), (0,)), scores_in)

    def splat(value):
        full = jnp.full((mma.SLOTS, columns), value, jnp.float32)
        return mg.layout_cast(full, scores_in)

    def fetch(name, start, layout):
        return load(inputs[name].at[b, kv, pl.ds(start, mma.SLOTS)], layout)

    def points(name, start, layout):
        return fetch(name, start, layout).astype(jnp.float32)

    def body(i, carry):
        top, total, sums = carry
        start = first + i * tile
        # The last tile starts early enough to be whole: slots seen before are masked.
        base = jnp.minimum(start, shape.slots - tile)
        starts = [base + u * mma.SLOTS for u in range(shape.unrolled)]
        key_words = [fetch("k", at, mma.key_layout(codes)) for at in starts]
        value_words = [fetch("v", at, mma.value_layout(codes)) for at in starts]
        key_scales: list[Any] = [None] * shape.unrolled
        value_scales: list[Any] = [None] * shape.unrolled
        if side.dynamic:
            key_scales = [fetch("k_scale", at, row) for at in starts]
            value_scales = [fetch("v_scale", at, row) for at in starts]
        scores, inverses = [], []
        for at, words, key_scale, value_scale in zip(
            starts, key_words, key_scales, value_scales, strict=True
        ):
            slot = rows + at
            visible = (slot >= start) & (slot < end)
            offset = points("k_zero", at, row) if zeros else None
            score = mma.tile_scores(words, queries, codes, offset)
            if key_scale is None:
                score = score * factor
            else:
                # A scale of zero, in hidden slots too, has neither logarithm nor inverse.
                least = jnp.float32(_LEAST_SCALE)
                value_scale = jnp.where(value_scale > least, value_scale, least)
                score = score * across(key_scale * factor) + across(jnp.log2(value_scale))
                inverses.append(across(jnp.float32(1) / value_scale))
            scores.append(jnp.where(across(visible), score, jnp.float32(MASKED)))
        new_top = functools.reduce(jnp.maximum, scores)
        new_top = jnp.maximum(top, mma.warp_maximum(new_top))
        shrink = jnp.exp2(top - new_top)
        level = new_top - jnp.float32(_HEADROOM)
        weights = [jnp.exp2(score - level) for score in scores]
        total = total * shrink
        for u, weight in enumerate(weights):
            total = total + (weight * inverses[u] if inverses else weight)
        offsets = [points("v_zero", at, value_row) for at in starts] if zeros else None
        terms = [mma.split_terms(weight, codes.dtype, _TERMS) for weight in weights]
        sums = mma.add_values(sums, shrink, value_words, terms, codes, offsets)
        return new_top, total, sums

    zero = mg.layout_cast(jnp.zeros((4, d, columns), jnp.float32), mma.sum_layout(codes))
    top, total, sums = lax.fori_loop(0, tiles, body, (splat(MASKED), splat(0.0), zero))

    # The four warps' states become one.
    largest = jnp.max(exponent(top), axis=0)
    level = lax.broadcast_in_dim(largest, (mma.SLOTS, columns), (1,)).astype(jnp.float32)
    weight = jnp.exp2(top - mg.layout_cast(level, scores_in))
    store(totals_ref, jnp.sum(total * weight, axis=0))
    store(tops_ref, largest)
    sums = jnp.sum(mma.scale_sums(sums, weight, codes), axis=0)
    store(sums_ref, sums * jnp.float32(1 / codes.shift))
    sums = load(sums_ref, rows_of_threads(d))
    column = mg.broadcasted_iota(jnp.int32, (d, columns), 1, layout=rows_of_threads(d))
    for g in range(shape.group):
        head = kv * shape.group + g
        plane = jnp.sum(jnp.where(column == g, sums, jnp.float32(0)), axis=1)
        if shape.parts > 1:
            store(outputs[0].at[b, head, part], plane)
            outputs[1][b, head, part] = tops_ref[g]
            outputs[2][b, head, part] = totals_ref[g]
        else:
            out = outputs[0].at[b, head]
            write_output(out, [plane], totals_ref[g], kv, inputs, order, shape.dtype)


def _load_queries(shape: _Shape, inputs, b, kv, query_ref) -> tuple[list[jax.Array], jax.Array]:
    """The queries `[columns, D]` as 16-bit terms, times the scales of channels; and their scale.

    A power of two brings them into float16's range: what is left of it multiplies the scores.
    Columns beyond the group are zero.
    """
    codes, group = shape.codes, shape.group
    d = codes.head_dim
    across = spread(d)
    rows = [
        load(inputs["q"].at[b, kv * group + g], across).astype(jnp.float32) for g in range(group)
    ]
    if shape.lifted:
        channel = load(inputs["k_scale"].at[kv, :, 0], across)
        rows = [row * channel for row in rows]

    def power_of_two(biased):
        full = mg.layout_cast(jnp.full((d,), biased << jnp.int32(23), jnp.int32), across)
        return lax.bitcast_convert_type(full, jnp.float32)

    magnitudes = [lax.bitcast_convert_type(jnp.abs(row), jnp.int32) for row in rows]
    largest = functools.reduce(lambda x, y: jnp.where(x > y, x, y), magnitudes)
    exponent_bits = jnp.max(largest) >> jnp.int32(23)
    exponent_bits = jnp.maximum(exponent_bits, jnp.int32(2 * _QUERY_EXPONENT))
    up = power_of_two(jnp.int32(254 + _QUERY_EXPONENT) - exponent_bits)
    down = power_of_two(exponent_bits - jnp.int32(_QUERY_EXPONENT))
    for g, row in enumerate(rows):
        store(query_ref.at[g], row * up)
    for g in range(group, shape.columns):
        store(query_ref.at[g], mg.layout_cast(jnp.zeros((d,), jnp.float32), across))
    query = load(query_ref, mma.query_layout(codes))
    # The 8 bits of a bfloat16 are exact in float16.
    exact = inputs["q"].dtype in (codes.dtype, jnp.bfloat16) and not shape.lifted
    return mma.split_terms(query, codes.dtype, 1 if exact else _TERMS), jnp.max(down)
