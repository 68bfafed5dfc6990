"""Products of int8 rows with integer weights on tensor cores: `mma_products` without floats.

A fragment of `mma.sync.m16n8k32` for 8-bit integers holds four bytes of K in a register where that
of floats holds two halves, and `WordFormat.signed_planes` are such bytes: a shift, a mask and a
flip for four codes of int4, a flip alone for int8. Sums are int32, exact over a segment or column.
Which row of K a byte stands for is free as before, so x comes as words of four rows in the order of
the format's `byte_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.matmul.mma_products import (
    array,
    by_units,
    column_layout,
    row_layout,
    sum_layout,
    word_layout,
)
from pallas_kernels.mosaic import mma_instructions as ptx
from pallas_kernels.mosaic.launch import runs_interpreted
from pallas_kernels.mosaic.mma_fragments import inline
from pallas_kernels.weights.word_format import WordFormat, rows_together

_ONES = 0x01010101


def byte_words(x: jax.Array, words: WordFormat) -> jax.Array:
    """int8 `[M, K]` (K of whole units) -> int32 `[units, M', planes]`, M' whole eights."""
    order = words.byte_rows
    assert order is not None
    x = by_units(x, words)
    return lax.bitcast_convert_type(rows_together(x, order), jnp.int32)


def multiply_bytes(sums: jax.Array, planes: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """int32 `[128, M]` in `sum_layout`: `sums` plus the product of a tile.

    `planes` are a unit's words, int32 `[4, 128]` of four signed bytes in `word_layout`; x is int32
    `[4, M, planes]` in `row_layout`, of `byte_words`.
    """
    if runs_interpreted():
        values = jnp.stack([_bytes(plane) for plane in planes], axis=1)  # [4, planes, 128, 4]
        rows = jnp.moveaxis(_bytes(x), 2, 1)  # [4, planes, M, 4]
        values, rows = (jnp.moveaxis(a, 2, 0).reshape(a.shape[2], -1) for a in (values, rows))
        return sums + lax.dot_general(values, rows, (((1,), (1,)), ((), ())))

    def emit(sums, x, *planes):
        words = [ptx.lanes(plane.registers.flat[0]) for plane in planes]
        acc = [[ptx.lanes(reg) for reg in four] for four in sums.registers.reshape(-1, 4)]
        for n, row in enumerate(_row_words(x, len(acc))):
            for a in (0, 2):  # columns 4r + a and 4r + a + 1
                both = [*acc[n][a], *acc[n][a + 1]]
                both = _emit_steps(both, [word[a : a + 2] for word in words], row)
                acc[n][a], acc[n][a + 1] = both[:2], both[2:]
        return array([[ptx.vector(pair) for pair in four] for four in acc], sums)

    layouts = [sum_layout(), row_layout(len(planes)), *[word_layout()] * len(planes)]
    return inline(emit, layouts, sums.shape, sum_layout(), jnp.int32)(sums, x, *planes)


def add_row_sums(sums: jax.Array, x: jax.Array) -> jax.Array:
    """int32 `[128, M]` in `sum_layout`: `sums` plus the sum of a tile's bytes of each row of x."""
    if runs_interpreted():
        return sums + jnp.sum(_bytes(x), axis=(0, 2, 3), dtype=jnp.int32)[None]

    def emit(sums, x):
        old = sums.registers.reshape(-1, 4)
        rows = _row_words(x, old.shape[0])
        ones = [[ptx.constant(_ONES)] * 2] * len(rows[0])
        out = []
        for n, row in enumerate(rows):
            both = [*ptx.lanes(old[n, 0]), *ptx.lanes(old[n, 1])]
            out.append([ptx.vector(_emit_steps(both, ones, row)[:2])] * 4)  # columns are alike
        return array(out, sums)

    layouts = [sum_layout(), row_layout(x.shape[-1])]
    return inline(emit, layouts, sums.shape, sum_layout(), jnp.int32)(sums, x)


def add_scaled_integers(
    totals: jax.Array,
    sums: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    row_sums: jax.Array | None = None,
) -> jax.Array:
    """float32 `totals + (sums + zero * row_sums) * scale`: `[128, M]` in `sum_layout`.

    `sums` and `row_sums` (of `add_row_sums`; None: without zero) are int32; scale and zero float32
    `[128]`.
    """
    if runs_interpreted():
        found = sums.astype(jnp.float32)
        if zero is not None and row_sums is not None:
            found = found + zero[:, None] * row_sums.astype(jnp.float32)
        return totals + found * scale[:, None]
    arrays, layouts = [totals, sums, scale], [sum_layout(), sum_layout(), column_layout()]
    if zero is not None:
        arrays, layouts = [*arrays, zero, row_sums], [*layouts, column_layout(), sum_layout()]

    def emit(totals, sums, scale, *rest):
        old, new = (a.registers.reshape(-1, 4) for a in (totals, sums))
        factors = ptx.lanes(scale.registers.flat[0])
        points = ptx.lanes(rest[0].registers.flat[0]) if rest else ()
        out = np.empty_like(old)
        for n, i in np.ndindex(old.shape):
            found = [ptx.as_float(x) for x in ptx.lanes(new[n, i])]
            if rest:
                own = ptx.lanes(rest[1].registers.reshape(-1, 4)[n, 0])
                pairs = zip(found, own, strict=True)
                found = [ptx.fma_f32(points[i], ptx.as_float(row), x) for x, row in pairs]
            pairs = zip(found, ptx.lanes(old[n, i]), strict=True)
            out[n, i] = ptx.vector([ptx.fma_f32(x, factors[i], y) for x, y in pairs])
        return array(out, totals)

    return inline(emit, layouts, totals.shape, sum_layout())(*arrays)


def _bytes(words: jax.Array) -> jax.Array:
    """int32 `[...]` -> their signed bytes as int32, `[..., 4]`."""
    return lax.bitcast_convert_type(words, jnp.int8).astype(jnp.int32)


def _row_words(x: Any, blocks: int) -> list[list[Any]]:
    """For each 8 rows, a thread's words of its row."""
    rows = x.registers.reshape(blocks, -1)
    return [[word for reg in row for word in ptx.lanes(reg)] for row in rows]


def _emit_steps(acc: list[Any], columns: list[list[Any]], row: list[Any]) -> list[Any]:
    """Four sums plus the products of words of two columns and of a row; two words at a time."""
    for i in range(0, len(row), 2):
        fragment = [word for pair in columns[i : i + 2] for word in pair]
        acc = ptx.mma_integers(acc, fragment, row[i : i + 2])
    return acc
