"""The body of every matrix-vector kernel: a block of columns, a slice of K, up to 8 rows of x.

A program is a warp group. It stages its slice of x in shared memory, each row of K times the power
of two that its format wants, and the sum of every segment of x beside it; then its threads, which
own one, two or four columns each, walk down the words of their columns. Timeline of a program::

    stage   first words from memory | x, sums -> shared memory | barrier
    steps   next words from memory | decode, multiply, add: one mask and M multiply-adds a weight
            end of a segment: bias or zero point times the sum of x, scale, into the total
    end     total * 2^exponent * scale of the column -> its own row of partial sums

All threads want the same numbers of x: M of them lie together in shared memory, and so do units,
so that the compiler makes 16-byte loads. M and the units of a step are axes of arrays, not unrolled
operations: Mosaic's layout inference takes longer than linear time in their number.

Instructions of the hot loop a weight (M = 1, 4096 x 4096 on an H200, counted from machine code), of
which two are the mask and the multiply-add: int4 in groups of 128 2.6, with zero points 2.6, int8
2.7, int2 2.4, nf4 3.3, cc2 3.5, mxfp4 3.5, nvfp4 3.8, float8_e4m3 4.4. Blocks of 512 columns take
0.2 less than those of 256. Eight rows: 10 to 12, a multiply-add for each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.mosaic.launch import load, runs_interpreted, store, synchronize
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.layout import WeightLayout

ReadX = Callable[[Any, int, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class WeightRefs:
    """The refs of a `KernelWeight`'s arrays in a kernel, without leading axes."""

    words: Any
    scale: Any
    zero: Any
    column_scale: Any
    constants: tuple[Any, ...]

    def expert(self, index: Any) -> WeightRefs:
        """Of one of a stack."""
        refs = (self.words, self.scale, self.zero, self.column_scale)
        a, b, c, d = (None if ref is None else ref.at[index] for ref in refs)
        return WeightRefs(a, b, c, d, tuple(ref.at[index] for ref in self.constants))


def kernel_operands(
    weight: KernelWeight,
) -> tuple[list[jax.Array], Callable[[Sequence[Any]], WeightRefs]]:
    """The arrays that a kernel reads, and how to name their refs."""
    fields = ("words", "scale", "zero", "column_scale")
    present = {name: a for name in fields if (a := getattr(weight, name)) is not None}

    # A unit's words on an axis of their own, so that neighbouring units are one load.
    *lead, rows, columns = weight.words.shape
    per_unit = weight.layout.words.words
    present["words"] = weight.words.reshape(*lead, rows // per_unit, per_unit, columns)

    def name_refs(refs: Sequence[Any]) -> WeightRefs:
        named = dict.fromkeys(fields) | dict(zip(present, refs, strict=False))
        return WeightRefs(**named, constants=tuple(refs[len(present) :]))

    return [*present.values(), *weight.constants], name_refs


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes; static."""

    layout: WeightLayout
    rows: int  # M
    columns: int  # of the block; a multiple of 128 that divides the padded N
    segments: int  # of K in the slice
    units: int  # of a column that a step decodes at once; a power of two
    prefetch: bool = True  # whether a step loads the words of the next one first

    @property
    def has_sums(self) -> bool:
        """Whether sums of x are needed."""
        return bool(self.layout.bias) or self.layout.zero_point == "integer"

    @property
    def step(self) -> int:
        """Units of a step: of one segment."""
        return min(self.units, self.layout.segment_units)

    @property
    def scratch(self) -> tuple[Any, Any, Any]:
        """Shared memory: staged x, its sums, norms of rows. M is innermost: loaded together."""
        units, rows = self.layout.segment_units, self.layout.words.rows
        return (
            mg.SMEM((self.segments, rows, units, self.rows), jnp.float32),
            mg.SMEM((self.segments, self.rows), jnp.float32),
            mg.SMEM((1, self.rows), jnp.float32),
        )

    @property
    def products(self) -> Any:
        """Layout of `[U, M, columns]`, of `[M, columns]` for steps of one unit: threads own
        neighbouring columns.
        """
        vector = self.columns // 128
        shape = (self.rows, self.columns)
        if self.step > 1:  # sums over an axis of one element have no layout
            shape = (self.step, *shape)
        tiling = mg.Tiling((shape, (32 * vector,), (vector,)))
        return mg.Layout.TILED(tiling, (-3,), (-2,), -1)


def staging_factors(layout: WeightLayout) -> np.ndarray:
    """The power of two of each row of a unit, float32 `[rows]`."""
    exponents = layout.words.exponents(runs_interpreted())
    return np.ldexp(np.float32(1), exponents).astype(np.float32)


def staged_layout(tile: Tile, segments: int) -> Any:
    """Layout of `[segments, rows, units, M]` of x; two or four segments are a warp's each."""
    layout = tile.layout
    units = layout.segment_units
    shape = (segments, layout.words.rows, units, tile.rows)
    tiling = mg.Tiling((shape,) if tile.rows == 1 else (shape, (1,)))
    last = -2 if tile.rows == 1 else -3
    lane_dims: tuple[Any, ...] = (last,) if units == 32 else (mg.Replicated(32 // units), last)
    warp_dims: tuple[Any, ...] = (mg.Replicated(4),)
    if segments in (2, 4):
        warp_dims = (last - 2,) if segments == 4 else (mg.Replicated(2), last - 2)
    return mg.Layout.TILED(tiling, warp_dims, lane_dims, -1)


def stage(tile: Tile, read_x: ReadX, factors_ref: Any, x_ref: Any, sums_ref: Any) -> None:
    """Fills shared memory (see `Tile.scratch`) with a slice of x; a barrier must follow.

    `read_x`: `(first segment in the slice, how many, array layout)` -> float32
    `[segments, rows, units, M]`. Bias and zero point are multiplied by the sums.
    """
    chunk = math.gcd(tile.segments, 4)
    if chunk == tile.rows == 1:
        # An array of one sum has no layout: several segments to a thread, or sums without arrays.
        # More than 64 rows of units at a time do not fit in registers (int3 has 32 a segment).
        few = (d for d in (3, 5, 7) if d * tile.layout.words.rows <= 64)
        chunk = next((d for d in few if tile.segments % d == 0), 1)
    alone = chunk == tile.rows == 1
    layout = staged_layout(tile, chunk)
    # The bias takes part in units of the unfinished sum, and so does the sum that a zero point
    # is multiplied by.
    exponent = tile.layout.words.exponent(runs_interpreted())
    bias = 1.0 if tile.layout.zero_point == "integer" else tile.layout.bias
    factor = jnp.float32(math.ldexp(-bias, -exponent))
    factors = load(factors_ref, layout.reduce(0).reduce(1).reduce(1))

    def one_chunk(i, _):
        segments = pl.ds(i * chunk, chunk)
        x = read_x(i * chunk, chunk, layout)
        store(x_ref.at[segments], x * lax.broadcast_in_dim(factors, x.shape, (1,)))
        if tile.has_sums and not alone:
            store(sums_ref.at[segments], jnp.sum(jnp.sum(x, axis=1), axis=1) * factor)
        return ()

    lax.fori_loop(0, tile.segments // chunk, one_chunk, ())
    if tile.has_sums and alone:
        synchronize()
        _sum_alone(tile, factor, x_ref, sums_ref)


def _sum_alone(tile: Tile, factor: jax.Array, x_ref: Any, sums_ref: Any) -> None:
    """Sums of one row of x, a segment at a time, by every thread from what is staged."""
    exponents = tile.layout.words.exponents(runs_interpreted())

    def one_segment(segment, _):
        def one_unit(unit, total):
            for r, exponent in enumerate(exponents):
                total = total + x_ref[segment, r, unit, 0] * jnp.float32(math.ldexp(1.0, -exponent))
            return total

        total = lax.fori_loop(0, tile.layout.segment_units, one_unit, jnp.float32(0))
        sums_ref[segment, 0] = total * factor
        return ()

    lax.fori_loop(0, tile.segments, one_segment, ())


def first_words(
    tile: Tile, refs: WeightRefs, first_column: Any, first_segment: Any
) -> list[jax.Array]:
    """Those of the first step, for `accumulate`: asked for before `stage`, they are there after it.

    `refs` are of one weight, without leading axes.
    """
    if not tile.prefetch:
        return []
    return _words(tile, refs, first_column, first_segment * tile.layout.segment_units)


def _words(tile: Tile, refs: WeightRefs, first_column: Any, unit: Any) -> list[jax.Array]:
    several = int(tile.step > 1)
    rows = pl.ds(unit, tile.step) if several else unit
    columns, fields = pl.ds(first_column, tile.columns), tile.products.reduce(several)
    count = tile.layout.words.words
    return [load(refs.words.at[rows, i, columns], fields) for i in range(count)]


def accumulate(
    tile: Tile,
    refs: WeightRefs,
    first_column: Any,
    first_segment: Any,
    x_ref: Any,
    sums_ref: Any,
    fetched: list[jax.Array],
) -> jax.Array:
    """Partial sums of the block: float32 `[M, columns]`, scales applied.

    `refs` are of one weight, without leading axes; `x_ref` and `sums_ref` as `stage` left them;
    `fetched` of `first_words`.
    """
    layout, words = tile.layout, tile.layout.words
    interpreted = runs_interpreted()
    columns = pl.ds(first_column, tile.columns)
    units, step = layout.segment_units, tile.step
    several = int(step > 1)  # arrays have an axis of units, the first
    shape = (step,) * several + (tile.rows, tile.columns)
    fields_shape = shape[:several] + shape[-1:]
    products = tile.products
    fields = products.reduce(several)  # [U, columns]
    staged = products.reduce(several + 1)  # [U, M]
    totals_layout = products.reduce(0) if several else products  # [M, columns]
    column, row = totals_layout.reduce(0), totals_layout.reduce(1)  # [columns], [M]
    axes = tuple(range(len(shape)))
    # Short segments are unrolled: 32 rows of K an iteration, if their number allows it.
    together = math.gcd(tile.segments, max(1, 32 // layout.segment))
    first_unit = first_segment * units
    last_unit = first_unit + (tile.segments * units - step)

    def of_column(ref, index):
        return load(ref.at[index, columns], column)

    constants = [of_column(ref, 0) for ref in refs.constants]
    if several:
        constants = [lax.broadcast_in_dim(c, fields_shape, (1,)) for c in constants]

    def units_from(unit):
        return pl.ds(unit, step) if several else unit

    def fetch(unit):
        return _words(tile, refs, first_column, unit)

    def one_step(segment, unit, parts, fetched):
        start = first_unit + segment * units + unit
        if tile.prefetch:
            following = fetch(jnp.minimum(start + step, last_unit))
        else:
            fetched, following = fetch(start), fetched
        rows = words.decode(fetched, constants, interpreted, fields)
        for r, value in enumerate(rows):
            x = load(x_ref.at[segment, r, units_from(unit)], staged)
            value = lax.broadcast_in_dim(value, shape, axes[:several] + axes[-1:])
            parts = parts + value * lax.broadcast_in_dim(x, shape, axes[:-1])
        return parts, following

    def scale_of(segment):
        if layout.group is None:
            return None
        return read_scale(layout, refs.scale, group_of(layout, first_segment + segment), of_column)

    def finish_segment(segment, parts, totals, scale):
        total = jnp.sum(parts, axis=0) if several else parts
        if tile.has_sums:
            sums = load(sums_ref.at[segment], row)
            sums = lax.broadcast_in_dim(sums, total.shape, (0,))
            if layout.zero_point == "integer":
                group = group_of(layout, first_segment + segment)
                zero = packed_bytes(refs.zero, group, of_column).astype(jnp.float32)
                sums = sums * lax.broadcast_in_dim(zero, total.shape, (1,))
            total = total + sums
        if scale is not None:
            total = total * lax.broadcast_in_dim(scale, total.shape, (1,))
        return totals + total

    zero_parts = mg.layout_cast(jnp.zeros(shape, jnp.float32), products)
    zero_totals = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    zero_totals = mg.layout_cast(zero_totals, totals_layout)

    def body(i, carry):
        totals, fetched = carry
        for s in range(together):
            segment = i * together + s
            scale = scale_of(segment)  # on its way while words are decoded
            if units == step:
                parts, fetched = one_step(segment, 0, zero_parts, fetched)
            else:
                parts, fetched = lax.fori_loop(
                    0,
                    units // step,
                    lambda t, c, segment=segment: one_step(segment, t * step, *c),
                    (zero_parts, fetched),
                )
            totals = finish_segment(segment, parts, totals, scale)
        return totals, fetched

    totals, _ = lax.fori_loop(0, tile.segments // together, body, (zero_totals, fetched))
    totals = totals * jnp.float32(math.ldexp(1.0, words.exponent(interpreted)))
    if refs.column_scale is not None:
        scale = of_column(refs.column_scale, 0)
        totals = totals * lax.broadcast_in_dim(scale, totals.shape, (1,))
    return totals


def group_of(layout: WeightLayout, segment: Any) -> Any:
    """The group that a segment belongs to."""
    if layout.group is None:
        return jnp.int32(0)
    per_group = layout.group // layout.segment
    return segment if per_group == 1 else segment // per_group


def packed_bytes(ref: Any, index: Any, of_column: Any, per_word: int = 4) -> jax.Array:
    """Number `index` of those that int32 words of a column hold; int32, unsigned."""
    bits = 32 // per_word
    word = of_column(ref, index // per_word)
    shift = lax.broadcast_in_dim(index % per_word * bits, word.shape, ())
    return lax.shift_right_logical(word, shift) & jnp.int32((1 << bits) - 1)


def read_scale(layout: WeightLayout, ref: Any, group: Any, of_column: Any) -> jax.Array:
    """float32 scales of a group."""
    packed = layout.packed_scale
    if packed is None:
        return of_column(ref, group).astype(jnp.float32)
    code = packed_bytes(ref, group, of_column, packed.per_word)
    return packed.decode(code, runs_interpreted())
