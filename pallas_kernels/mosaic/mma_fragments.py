"""Attention tiles on tensor cores, registers to registers: what `attention_mma` is made of.

`mma.sync.m16n8k16` multiplies A `[16, 16]` and B `[16, 8]`, each spread over a warp: thread
`(r, t) = (lane // 4, lane % 4)` holds of A the rows r and r + 8 at the columns 2t, 2t + 1,
2t + 8, 2t + 9, of B the rows 2t, 2t + 1, 2t + 8, 2t + 9 at column r, and of the result the rows r
and r + 8 at the columns 2t, 2t + 1. Query heads are columns (8 at a time), so that:

- scores `[slots, heads]` = keys (A: 16 slots of a warp, 16 channels) x queries (B);
- sums `[channels, heads]` += values (A: 16 channels, 16 slots) x probabilities (B).

Which channel a column (of keys) or a row (of values) stands for is free as long as queries and sums
agree, so a thread loads what lies together in memory: of keys 4 neighbouring words of its slots r
and r + 8, of values words of its four slots 2t, 2t + 1, 2t + 8, 2t + 9. `mma_codes` makes floats of
them. Probabilities cross the warp by `movmatrix`.

Here an array is a tile of 64 slots, 16 for each of the four warps. The interpreter has no tensor
cores: there the same functions compute the same numbers with `jax.numpy`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as mg
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import mma_instructions as ptx
from pallas_kernels.mosaic.launch import runs_interpreted
from pallas_kernels.mosaic.mma_codes import Codes

SLOTS = 64
"""Slots of a tile: four warps of 16."""


def score_layout() -> Any:
    """`[64, heads]`: the result of a product of keys."""
    return mg.Layout.TILED(mg.Tiling(((64, 8), (16, 8), (8, 8), (2,))), (-7,), (-3, -2), -1)


def key_layout(codes: Codes) -> Any:
    """`[64, W]` words of keys."""
    wide = 4 * codes.key_vector
    tiling = ((64, wide), (16, wide), (8, wide), (codes.key_vector,))
    return mg.Layout.TILED(mg.Tiling(tiling), (-7,), (-3, -2), -1)


def value_layout(codes: Codes) -> Any:
    """`[64, W]` words of values."""
    wide = 8 * codes.value_vector
    tiling = ((64, wide), (16, wide), (8, wide), (2, codes.value_vector))
    return mg.Layout.TILED(mg.Tiling(tiling), (-8,), (-3, -4), -1)


def query_layout(codes: Codes) -> Any:
    """`[heads, D]`, float32 or 16-bit; every warp has a copy."""
    lane = codes.key_vector * codes.per_word
    tiling = ((8, 4 * lane), (lane,), (4,))
    return mg.Layout.TILED(mg.Tiling(tiling), (mg.Replicated(4),), (-4, -3), -1)


def sum_layout(codes: Codes) -> Any:
    """`[4, D, heads]` sums of values, one for each warp."""
    lane = codes.value_vector * codes.per_word
    tiling = ((4, 8 * lane, 8), (lane, 8), (2,))
    return mg.Layout.TILED(mg.Tiling(tiling), (-6,), (-5, -2), -1)


def split_terms(x: jax.Array, dtype: Any, terms: int) -> list[jax.Array]:
    """Arrays of `dtype` whose sum is float32 `x` up to the last one's rounding."""
    parts = []
    for i in range(terms):
        parts.append(x.astype(dtype))
        if i + 1 < terms:
            x = x - parts[-1].astype(jnp.float32)
    return parts


def tile_scores(
    words: jax.Array, queries: Sequence[jax.Array], codes: Codes, offset: jax.Array | None = None
) -> jax.Array:
    """float32 `[64, heads]`: products of a tile of keys, before scales, times `codes.shift`.

    Words are int32 in `key_layout`; `queries` (of `codes.dtype`, in `query_layout`) add up to the
    query; `offset` is float32 `[64]` in `score_layout().reduce(1)`, zero points of an int4 cache.
    """
    heads = queries[0].shape[0]
    if runs_interpreted():
        keys = _decode_reference(words, codes, offset)
        query = functools.reduce(jnp.add, [q.astype(jnp.float32) for q in queries])
        return _dot(keys, query, 1, 1)
    arrays = [words, *queries, *([] if offset is None else [offset])]
    layouts = [key_layout(codes), *[query_layout(codes)] * len(queries)]
    if offset is not None:
        layouts.append(score_layout().reduce(1))

    def multiply(words, *rest):
        return _emit_scores(words, rest[: len(queries)], rest[len(queries) :], codes, heads)

    return inline(multiply, layouts, (SLOTS, heads), score_layout())(*arrays)


def warp_maximum(x: jax.Array) -> jax.Array:
    """`[64, heads]` in `score_layout`: each warp's largest of 16 slots, in all of them."""
    heads = x.shape[1]
    if runs_interpreted():
        rows = x.reshape(4, 16, heads)
        return jnp.broadcast_to(jnp.max(rows, axis=1, keepdims=True), rows.shape).reshape(x.shape)

    def maximum(x):
        regs = x.registers.reshape(heads // 8, 2)
        out = np.empty_like(regs)
        for n in range(heads // 8):
            parts = []
            for i in range(2):
                one = ptx.binary("max.f32", ptx.lane(regs[n, 0], i), ptx.lane(regs[n, 1], i))
                for distance in (4, 8, 16):
                    one = ptx.binary("max.f32", one, ptx.shuffle(one, distance))
                parts.append(one)
            out[n, :] = ptx.vector(parts)
        return _array(out, x)

    return inline(maximum, [score_layout()], x.shape, score_layout())(x)


def add_values(
    sums: jax.Array,
    shrink: jax.Array,
    words: Sequence[jax.Array],
    weights: Sequence[Sequence[jax.Array]],
    codes: Codes,
    offsets: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """float32 `[4, D, heads]` in `sum_layout`: `sums * shrink` and, for every tile, its values
    (`codes.shift` too small) times its weights.

    `shrink` is the same in all 16 slots of a warp. Of each tile, words are int32 in `value_layout`,
    weights the terms of `split_terms` in `score_layout`, as shrink is, and offsets float32 `[64]`
    in `value_layout(codes).reduce(1)`, zero points of an int4 cache.
    """
    heads = sums.shape[2]
    if runs_interpreted():
        sums = sums * shrink.reshape(4, 16, heads)[:, :1]
        for i, (tile, terms) in enumerate(zip(words, weights, strict=True)):
            values = _decode_reference(tile, codes, None if offsets is None else offsets[i])
            weight = functools.reduce(jnp.add, [w.astype(jnp.float32) for w in terms])
            pairs = zip(values.reshape(4, 16, -1), weight.reshape(4, 16, -1), strict=True)
            sums = sums + jnp.stack([_dot(value, one, 0, 0) for value, one in pairs])
        return sums
    terms = len(weights[0]) if weights else 0
    arrays = [sums, shrink]
    layouts = [sum_layout(codes), score_layout()]
    for i, tile in enumerate(words):
        arrays += [tile, *weights[i], *([] if offsets is None else [offsets[i]])]
        layouts += [value_layout(codes), *[score_layout()] * terms]
        layouts += [] if offsets is None else [value_layout(codes).reduce(1)]
    stride = 1 + terms + (offsets is not None)

    def accumulate(sums, shrink, *rest):
        regs = _scaled(sums, shrink, heads)
        for i in range(0, len(rest), stride):
            offset = rest[i + 1 + terms : i + stride]
            _emit_sums(regs, rest[i], rest[i + 1 : i + 1 + terms], offset, codes, heads)
        return _array(_vectors(regs), sums)

    return inline(accumulate, layouts, sums.shape, sum_layout(codes))(*arrays)


def scale_sums(sums: jax.Array, factor: jax.Array, codes: Codes) -> jax.Array:
    """`sums [4, D, heads]` times a warp's `factor [64, heads]`, as in `add_values`."""
    return add_values(sums, factor, [], [], codes)


# -- the same in jax.numpy, for the interpreter


def _dot(x: jax.Array, y: jax.Array, i: int, j: int) -> jax.Array:
    return lax.dot_general(x, y, (((i,), (j,)), ((), ())), precision=lax.Precision.HIGHEST)


def _decode_reference(words: jax.Array, codes: Codes, offset: jax.Array | None) -> jax.Array:
    """float32 `[64, D]`: what the tensor cores multiply."""
    bits = 32 // codes.per_word
    shifts = jnp.arange(codes.per_word, dtype=jnp.int32) * jnp.int32(bits)
    planes = lax.shift_right_logical(
        jnp.broadcast_to(words[:, :, None], (*words.shape, codes.per_word)),
        jnp.broadcast_to(shifts[None, None], (*words.shape, codes.per_word)),
    )
    planes = planes.reshape(words.shape[0], codes.head_dim) & jnp.int32((1 << bits) - 1)
    return codes.values(planes, offset)


# -- what is emitted for the GPU


def inline(
    emit: Any, layouts: Sequence[Any], shape: tuple[int, ...], layout: Any, dtype: Any = jnp.float32
) -> Any:
    """A function of arrays in `layouts` whose registers `emit` makes: `shape`, of `dtype`."""
    result = mg.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout)
    decorate: Any = mg.inline_mgpu(arg_types=tuple(layouts), return_type=result)
    return decorate(lambda _context, *arrays: emit(*arrays))


def _emit_scores(words, queries, offset, codes: Codes, heads: int):
    steps = codes.width // (4 * codes.key_vector)
    words_ = words.registers.reshape(steps, 2)
    pairs = [_query_pairs(q, codes, heads) for q in queries]
    zeros = [None, None]
    if offset:
        zeros = [codes.zero_points(x, x) for x in offset[0].registers.flat]
    acc = [[ptx.zero_f32() for _ in range(4)] for _ in range(heads // 8)]
    for step in range(steps):
        rows = [[ptx.lane(words_[step, h], i) for i in range(codes.key_vector)] for h in range(2)]
        fragments = _key_fragments(rows, codes, zeros)
        for k, fragment in enumerate(fragments):
            for n in range(heads // 8):
                for pair in pairs:
                    acc[n] = ptx.mma(acc[n], fragment, pair[n][step][k], codes.dtype)
    out = np.empty((heads // 8, 2), dtype=object)
    for n in range(heads // 8):
        out[n, 0], out[n, 1] = ptx.vector(acc[n][:2]), ptx.vector(acc[n][2:])
    layout = score_layout().to_mgpu()
    out = out.reshape(layout.registers_shape((SLOTS, heads)))
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)


def _query_pairs(query, codes: Codes, heads: int):
    """B fragments `[heads / 8][step][k]`, in the order of `_key_fragments`."""
    lane = codes.key_vector * codes.per_word
    steps = codes.head_dim // (4 * lane)
    regs = query.registers.reshape(heads // 8, steps, lane // 4)
    # A register has the channels (0, 1) and (2, 3) of four.
    return [[codes.query([ptx.as_words(reg) for reg in step]) for step in block] for block in regs]


def _key_fragments(rows, codes: Codes, zeros):
    """A fragments of the words `rows[half][i]` of two slots."""
    low, high = halves = [], []
    for i in range(codes.key_vector):
        for half in range(2):
            halves[half].extend(codes.registers(rows[half][i], zeros[half]))
    first = range(0, len(low), 2)
    return [[low[j], high[j], low[j + 1], high[j + 1]] for j in first]


def _emit_sums(regs, words, weights, offset, codes: Codes, heads: int) -> None:
    """Adds one tile to `regs [step][heads / 8][channel][2]`."""
    steps = codes.width // (8 * codes.value_vector)
    words_ = words.registers.reshape(steps, 2, 2)
    zeros = [None, None]
    if offset:
        points = offset[0].registers.reshape(2, 2)
        zeros = [codes.zero_points(points[a, 0], points[a, 1]) for a in range(2)]
    columns = []  # B fragments of each term and 8 heads
    for weight in weights:
        halves = weight.registers.reshape(heads // 8, 2)
        columns.append(
            [[ptx.transpose(ptx.as_word(h)) for h in halves[n]] for n in range(heads // 8)]
        )
    for step in range(steps):
        for i in range(codes.value_vector):
            four = [[ptx.lane(words_[step, a, b], i) for b in range(2)] for a in range(2)]
            channels = _value_channels(four, codes, zeros)
            for j in range(0, codes.per_word, 2):
                fragment = [channels[0][j], channels[0][j + 1], channels[1][j], channels[1][j + 1]]
                for n in range(heads // 8):
                    at = i * codes.per_word + j
                    acc = [*regs[step][n][at], *regs[step][n][at + 1]]
                    for column in columns:
                        acc = ptx.mma(acc, fragment, column[n], codes.dtype)
                    regs[step][n][at], regs[step][n][at + 1] = acc[:2], acc[2:]


def _value_channels(four, codes: Codes, zeros):
    """`[a][channel]`: the two slots `2t + 8a`, `2t + 8a + 1` of each channel of a word."""
    out = []
    for a in range(2):
        first, second = four[a]
        pairs = [ptx.permute(first, second, selector) for selector in codes.interleave]
        out.append([register for pair in pairs for register in codes.registers(pair, zeros[a])])
    return out


def _scaled(sums, shrink, heads: int):
    """Registers of sums as `[step][heads / 8][channel][2]`, times the warp's factor."""
    lane = sums.registers.shape[6]
    regs = sums.registers.reshape(-1, heads // 8, lane)
    factors = [ptx.lanes(reg) for reg in shrink.registers.reshape(heads // 8, 2)[:, 0]]

    def scaled(reg, factor):
        return [arith.mulf(x, f) for x, f in zip(ptx.lanes(reg), factor, strict=True)]

    blocks = range(heads // 8)
    return [[[scaled(reg, factors[n]) for reg in step[n]] for n in blocks] for step in regs]


def _vectors(regs):
    flat = [ptx.vector(pair) for step in regs for block in step for pair in block]
    out = np.empty(len(flat), dtype=object)
    out[:] = flat
    return out


def _array(registers, like):
    return mgpu.FragmentedArray(
        _registers=registers.reshape(like.registers.shape), _layout=like.layout, _is_signed=None
    )
