"""Products of weights on tensor cores, registers to registers: what `matmul.mma` is made of.

`mma.sync.m16n8k16` multiplies A `[16, 16]` and B `[16, 8]` (see `mma_fragments`). Columns of the
weight are rows of A, rows of x are columns of B, 8 at a time. Thread `(r, t) = (lane // 4, lane %
4)` loads unit t of four for four neighbouring columns 4r .. 4r + 3 of its warp's 32, one word each
(one 128-bit load), and makes floats of them: the columns are the rows r and r + 8 of two A. Which
row of K a column of A stands for is free as long as x agrees, so x comes as words of two rows in
the order of the format's `paired_rows`, and a thread loads those of its unit and of row r of x.

The interpreter has no tensor cores: there the same functions compute the same numbers with
`jax.numpy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.mosaic import mma_instructions as ptx
from pallas_kernels.mosaic.launch import runs_interpreted
from pallas_kernels.mosaic.mma_fragments import inline
from pallas_kernels.weights.scales import PACKED_SCALES
from pallas_kernels.weights.word_format import WordFormat, rows_together

COLUMNS = 128
"""Of a tile of a weight: four warps of 32."""

UNITS = 4
"""Of a tile, along K: one a thread of four."""

ROWS = 8
"""Rows of x that tensor cores multiply at a time."""


def word_layout() -> Any:
    """`[4, 128]` words of a weight."""
    return mg.Layout.TILED(mg.Tiling(((4, 128), (32,), (4,))), (-3,), (-2, -4), -1)


def column_layout() -> Any:
    """`[128]` numbers of columns."""
    return mg.Layout.TILED(mg.Tiling(((128,), (32,), (4,))), (-3,), (-2, mg.Replicated(4)), -1)


def row_layout(pairs: int) -> Any:
    """`[4, M, pairs]` words of x; every warp has a copy."""
    tiling = mg.Tiling(((4, 8, min(4, pairs)),))
    return mg.Layout.TILED(tiling, (mg.Replicated(4),), (-2, -3), -1)


def sum_layout() -> Any:
    """`[128, M]` sums."""
    return mg.Layout.TILED(mg.Tiling(((128, 8), (32, 8), (4, 2))), (-6,), (-4, -3), -1)


def result_layout() -> Any:
    """`[M, 128]`: sums, turned; four neighbouring columns in a thread."""
    return mg.Layout.TILED(mg.Tiling(((8, 128), (2, 32), (4,))), (-4,), (-2, -5), -1)


def paired(x: jax.Array, words: WordFormat) -> jax.Array:
    """16-bit floats `[M, K]` (K of whole units) -> int32 `[units, M', pairs]`, M' whole eights."""
    pairs = words.paired_rows
    assert pairs is not None
    x = by_units(x, words)
    return lax.bitcast_convert_type(rows_together(x, pairs), jnp.int32)


def by_units(x: jax.Array, words: WordFormat) -> jax.Array:
    """`[M, K]` -> `[units, M', rows of a unit]`, M' whole eights."""
    x = jnp.pad(x, [(0, -x.shape[0] % ROWS), (0, 0)])
    return jnp.swapaxes(x.reshape(x.shape[0], -1, words.rows), 0, 1)


def multiply(
    sums: jax.Array,
    words: Sequence[jax.Array],
    x: jax.Array,
    format: WordFormat,
    dtype: Any,
    *,
    columns: Sequence[jax.Array] = (),
    middle: float = 0.0,
    zero: jax.Array | None = None,
    scales: tuple[jax.Array, int] | None = None,
) -> jax.Array:
    """float32 `[128, M]` in `sum_layout`: `sums` plus the product of a tile, before scales, times
    `2**format.fragment_exponent(dtype)`.

    `words` are the unit's, each int32 `[4, 128]` in `word_layout`; x is int32 `[4, M, pairs]` in
    `row_layout`, of `paired`; `columns` are the format's constants, float32 `[128]`. `middle`, or
    `zero` of each column, is subtracted from codes. Of formats with `scaled_fragments` there are
    `scales` instead, int32 words `[128]` of four e4m3, and which half of them the units' are.
    """
    exponent = format.fragment_exponent(dtype)
    if runs_interpreted():
        values = _decode_reference(words, columns, format) - jnp.float32(middle)
        if zero is not None:
            values = values - zero[None, None, :]
        if scales is not None:
            values = values * _scales_reference(*scales)[:, None, :]
        rows = _rows_reference(x, format, dtype)
        values = (values * jnp.float32(2.0**exponent)).reshape(-1, values.shape[-1])
        rows = jnp.moveaxis(rows, 1, 2).reshape(values.shape[0], -1)
        dims = (((0,), (0,)), ((), ()))
        return sums + lax.dot_general(values, rows, dims, precision=lax.Precision.HIGHEST)
    own = [zero] if zero is not None else [scales[0]] if scales is not None else []
    half = None if scales is None else scales[1]
    arrays = [sums, x, *words, *columns, *own]
    layouts = [sum_layout(), row_layout(x.shape[-1]), *[word_layout()] * len(words)]
    layouts += [column_layout()] * (len(columns) + len(own))

    def emit(sums, x, *rest):
        numbers = [ptx.lanes(a.registers.flat[0]) for a in rest]
        first, numbers = numbers[: len(words)], numbers[len(words) :]
        offsets = _emit_offsets(numbers[len(columns) :], exponent, dtype, middle, half)
        return _emit_product(sums, x, first, numbers[: len(columns)], offsets, format, dtype)

    return inline(emit, layouts, sums.shape, sum_layout())(*arrays)


def add_scaled(totals: jax.Array, sums: jax.Array, scale: jax.Array) -> jax.Array:
    """`totals + sums * scale`: `[128, M]` in `sum_layout`, scale float32 `[128]` of columns."""
    if runs_interpreted():
        return totals + sums * scale[:, None]

    def emit(totals, sums, scale):
        factors = ptx.lanes(scale.registers.flat[0])
        old, new = (a.registers.reshape(-1, 4) for a in (totals, sums))
        out = np.empty_like(old)
        for n, i in np.ndindex(old.shape):
            pairs = zip(ptx.lanes(new[n, i]), ptx.lanes(old[n, i]), strict=True)
            out[n, i] = ptx.vector([ptx.fma_f32(x, factors[i], y) for x, y in pairs])
        return array(out, totals)

    layouts = [sum_layout(), sum_layout(), column_layout()]
    return inline(emit, layouts, totals.shape, sum_layout())(totals, sums, scale)


def turned(totals: jax.Array) -> jax.Array:
    """`[M, 128]` in `result_layout` of `[128, M]` in `sum_layout`: no data moves."""
    columns, rows = totals.shape
    if runs_interpreted():
        return totals.T
    layout = result_layout()

    def emit(totals):
        old = totals.registers.reshape(-1, 4)
        out = np.empty((old.shape[0], 2), dtype=object)
        for n, i in np.ndindex(out.shape):
            out[n, i] = ptx.vector([ptx.lane(old[n, c], i) for c in range(4)])
        registers = out.reshape(layout.to_mgpu().registers_shape((rows, columns)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return inline(emit, [sum_layout()], (rows, columns), layout)(totals)


# -- the same in jax.numpy, for the interpreter


def _decode_reference(
    words: Sequence[jax.Array], columns: Sequence[jax.Array], format: WordFormat
) -> jax.Array:
    """float32 `[4, rows, 128]`."""
    wide = [jnp.broadcast_to(c[None, :], words[0].shape) for c in columns]
    last = format.exponent(True)
    powers = [jnp.float32(2.0 ** (e + last)) for e in format.exponents(True)]
    rows = format.decode(words, wide, True)
    return jnp.stack([row * power for row, power in zip(rows, powers, strict=True)], axis=1)


def _scales_reference(words: jax.Array, half: int) -> jax.Array:
    """float32 `[4, 128]` of the units."""
    shifts = [16 * half + 8 * (unit // 2) for unit in range(UNITS)]
    codes = [lax.shift_right_logical(words, jnp.full_like(words, s)) for s in shifts]
    codes = jnp.stack(codes) & jnp.int32(0xFF)
    return PACKED_SCALES["float8_e4m3fn"].decode(codes, True)


def _rows_reference(x: jax.Array, format: WordFormat, dtype: Any) -> jax.Array:
    """float32 `[4, M, rows]` of the words of x."""
    rows: list[Any] = [None] * format.rows
    for i, pair in enumerate(format.paired_rows or ()):
        for half, row in enumerate(pair):
            bits = lax.shift_right_logical(x[..., i], jnp.full_like(x[..., i], 16 * half))
            bits = bits.astype(jnp.uint16)
            rows[row] = lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)
    return jnp.stack(rows, axis=-1)


# -- what is emitted for the GPU


def _emit_offsets(own, exponent: int, dtype, middle: float, half):
    """What the fragments of a thread's four columns are offset by, or scaled with."""
    if half is not None:
        unit = mgpu.thread_idx()
        return [ptx.e4m3_scales(word, half, unit, dtype) for word in own[0]]
    if own:
        return [ptx.scaled_pair(zero, -(2.0**exponent), dtype) for zero in own[0]]
    return [ptx.float_pair(-middle * 2.0**exponent, dtype) if middle else None] * 4


def _emit_product(sums, x, words, constants, offsets, format, dtype):
    acc = [[ptx.lanes(reg) for reg in four] for four in sums.registers.reshape(-1, 4)]
    rows = x.registers.reshape(len(acc), -1)
    rows = [[word for reg in row for word in ptx.lanes(reg)] for row in rows]
    columns = []
    for c in range(4):
        own = [word[c] for word in words], [constant[c] for constant in constants]
        columns.append(format.fragments(*own, offsets[c], dtype))
    for a in (0, 2):  # columns 4r + a and 4r + a + 1
        for low, high in zip(columns[a], columns[a + 1], strict=True):
            for i in range(0, len(low), 2):
                fragment = [low[i], high[i], low[i + 1], high[i + 1]]
                for n, row in enumerate(rows):
                    both = [*acc[n][a], *acc[n][a + 1]]
                    both = ptx.mma(both, fragment, row[i : i + 2], dtype)
                    acc[n][a], acc[n][a + 1] = both[:2], both[2:]
    out = np.empty((len(acc), 4), dtype=object)
    for n, i in np.ndindex(out.shape):
        out[n, i] = ptx.vector(acc[n][i])
    return array(out, sums)


def array(registers: Any, like: Any) -> Any:
    """Registers `[M / 8, 4]` as an array in the layout of another."""
    out = np.empty(like.registers.size, dtype=object)
    out[:] = [reg for four in registers for reg in four]
    out = out.reshape(like.registers.shape)
    return mgpu.FragmentedArray(_registers=out, _layout=like.layout, _is_signed=like.is_signed)
