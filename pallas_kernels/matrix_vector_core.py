"""The body of every matrix-vector kernel: a block of columns, a piece of K, up to 8 rows of x.

A program is a warp group. It stages its piece of x in shared memory, each row of K times the power
of two that its format wants, and the sum of every segment of x beside it; then its threads, which
own one, two or four columns each, walk down the words of their columns. Timeline of a program::

    stage   x, sums -> shared memory | barrier
    steps   next words from memory | decode, multiply, add: one mask and M multiply-adds a weight
            end of a segment: bias or zero point times the sum of x, scale, into the total
    end     total * 2^exponent * scale of the column -> its own row of partial sums

x is read from shared memory as scalars: all threads want the same, and the compiler makes 16-byte
loads of four neighbours.
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

from pallas_kernels.launch import runs_interpreted
from pallas_kernels.layouts import KernelWeight, WeightLayout

ReadX = Callable[[int, int, int, Any], jax.Array]

_TILES_IN_FLIGHT = 8  # of x, while it is staged


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

        def pick(ref):
            return None if ref is None else ref.at[index]

        return WeightRefs(
            pick(self.words),
            pick(self.scale),
            pick(self.zero),
            pick(self.column_scale),
            tuple(pick(ref) for ref in self.constants),
        )


def kernel_operands(
    weight: KernelWeight,
) -> tuple[list[jax.Array], Callable[[Sequence[Any]], WeightRefs]]:
    """The arrays that a kernel reads, and how to name their refs."""
    fields = {"words": weight.words, "scale": weight.scale, "zero": weight.zero}
    fields["column_scale"] = weight.column_scale
    present = {name: a for name, a in fields.items() if a is not None}

    def name_refs(refs: Sequence[Any]) -> WeightRefs:
        named = dict.fromkeys(fields) | dict(zip(present, refs, strict=False))
        return WeightRefs(**named, constants=tuple(refs[len(present) :]))

    return [*present.values(), *weight.constants], name_refs


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one program computes; static.

    Attributes:
      layout: of the weight.
      rows: M, rows of x.
      columns: of the block; a multiple of 128 that divides the padded N.
      segments: of K in the piece.
      units: units of a format that a step decodes.
      prefetch: whether a step loads the words of the next one first.
    """

    layout: WeightLayout
    rows: int
    columns: int
    segments: int
    units: int
    prefetch: bool = True

    @property
    def has_sums(self) -> bool:
        """Whether sums of x are needed."""
        return bool(self.layout.bias) or self.layout.zero_point == "integer"

    @property
    def scratch(self) -> tuple[Any, Any]:
        """Shared memory: staged x and its sums."""
        return (
            mg.SMEM((self.rows, self.segments, self.layout.segment), jnp.float32),
            mg.SMEM((self.rows, self.segments), jnp.float32),
        )


def staging_factors(layout: WeightLayout) -> np.ndarray:
    """The power of two of each row of a segment, float32 ``[S]``."""
    exponents = layout.words.exponents(runs_interpreted())
    repeats = layout.segment // layout.words.rows
    return np.tile(np.ldexp(np.float32(1), exponents).astype(np.float32), repeats)


def tile_layout(rows: int, segment: int) -> Any:
    """Layout of ``[..., rows, S]``: a row to a warp, neighbours to a lane; rows are 1, 2 or 4."""
    vector = max(1, segment // 32)
    lanes = segment // vector
    lane_dims: tuple[Any, ...] = (-2,) if lanes == 32 else (mg.Replicated(32 // lanes), -2)
    warp_dims: tuple[Any, ...] = (mg.Replicated(4),)
    if rows > 1:
        warp_dims = (-3,) if rows == 4 else (mg.Replicated(2), -3)
    tiling = mg.Tiling(((rows, segment), (vector,)))
    return mg.Layout.TILED(tiling, warp_dims, lane_dims, -1)


def load(ref: Any, layout: Any) -> jax.Array:
    """An array in a layout, however slow the load."""
    return mg.load(ref, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    """Stores an array, however slow the store."""
    if hasattr(mg, "store"):  # jax 0.12; before, a plain assignment asks for no optimization
        mg.store(ref, value, optimized=False)
    else:
        ref[...] = value


def stage(piece: Piece, read_x: ReadX, factors_ref: Any, x_ref: Any, sums_ref: Any) -> None:
    """Fills shared memory with a piece of x; a barrier must follow.

    Args:
      piece: what the program computes.
      read_x: ``(m, first segment in the piece, R, array layout) -> [R, S]`` float32.
      factors_ref: float32 ``[S]``, `staging_factors`.
      x_ref: shared, ``[M, segments, S]``.
      sums_ref: shared, ``[M, segments]``: what bias and zero point are multiplied by.
    """
    tile = math.gcd(piece.segments, 4)
    layout = tile_layout(tile, piece.layout.segment)
    factors = load(factors_ref, layout.reduce(0))
    # The bias takes part in units of the unfinished sum, and so does the sum that a zero point
    # is multiplied by.
    exponent = piece.layout.words.exponent(runs_interpreted())
    bias = 1.0 if piece.layout.zero_point == "integer" else piece.layout.bias
    factor = jnp.float32(math.ldexp(-bias, -exponent))
    places = [(m, s) for m in range(piece.rows) for s in range(0, piece.segments, tile)]
    for first in range(0, len(places), _TILES_IN_FLIGHT):
        some = places[first : first + _TILES_IN_FLIGHT]
        tiles = [read_x(m, s, tile, layout) for m, s in some]
        for (m, s), x in zip(some, tiles, strict=True):
            wide = lax.broadcast_in_dim(factors, x.shape, (1,))
            store(x_ref.at[m, pl.ds(s, tile)], x * wide)
            if piece.has_sums:
                store(sums_ref.at[m, pl.ds(s, tile)], jnp.sum(x, axis=1) * factor)


def accumulate(
    piece: Piece, refs: WeightRefs, first_column: Any, first_segment: Any, x_ref: Any, sums_ref: Any
) -> list[jax.Array]:
    """Partial sums of the block: M arrays ``[columns]`` float32, scales applied.

    Args:
      piece: what the program computes.
      refs: of one weight, without leading axes.
      first_column: of the block.
      first_segment: of the piece in the column.
      x_ref: as `stage` left it.
      sums_ref: likewise.
    """
    layout, words = piece.layout, piece.layout.words
    interpreted = runs_interpreted()
    columns = pl.ds(first_column, piece.columns)
    units = layout.segment // words.rows  # of a segment
    step = min(piece.units, units)
    together = math.gcd(piece.segments, max(1, piece.units // units))  # segments unrolled
    first_unit = first_segment * units
    last_step = first_unit + piece.segments * units - step
    constants = [ref[0, columns] for ref in refs.constants]

    def fetch(unit):
        rows = [unit * words.words + i for i in range(step * words.words)]
        return [refs.words[row, columns] for row in rows]

    def steps(segment, within, parts, fetched):
        """One step: `within` counts steps of the segment."""
        unit = first_unit + segment * units + within * step
        if piece.prefetch:
            following = fetch(jnp.minimum(unit + step, last_step))
        else:
            fetched, following = fetch(unit), fetched
        for u in range(step):
            some = fetched[u * words.words : (u + 1) * words.words]
            row = within * step * words.rows + u * words.rows
            for r, value in enumerate(words.decode(some, constants, interpreted)):
                for m in range(piece.rows):
                    parts[m] = parts[m] + value * x_ref[m, segment, row + r]
        return parts, following

    def finish_segment(segment, parts, totals):
        place = first_segment + segment
        if layout.zero_point == "integer":
            zero = packed_bytes(refs.zero, group_of(layout, place), columns).astype(jnp.float32)
            parts = [p + zero * sums_ref[m, segment] for m, p in enumerate(parts)]
        elif piece.has_sums:
            parts = [p + sums_ref[m, segment] for m, p in enumerate(parts)]
        if layout.group is not None:
            scale = read_scale(layout, refs.scale, group_of(layout, place), columns)
            parts = [p * scale for p in parts]
        return [t + p for t, p in zip(totals, parts, strict=True)]

    zeros = [jnp.zeros((piece.columns,), jnp.float32) for _ in range(piece.rows)]

    def body(i, carry):
        totals, fetched = carry
        for s in range(together):
            segment = i * together + s
            if units == step:
                parts, fetched = steps(segment, 0, list(zeros), fetched)
            else:
                parts, fetched = lax.fori_loop(
                    0,
                    units // step,
                    lambda t, c, segment=segment: steps(segment, t, list(c[0]), c[1]),
                    (list(zeros), fetched),
                )
            totals = finish_segment(segment, parts, totals)
        return totals, fetched

    start = fetch(first_unit) if piece.prefetch else []
    totals, _ = lax.fori_loop(0, piece.segments // together, body, (zeros, start))
    finish = jnp.float32(math.ldexp(1.0, words.exponent(interpreted)))
    totals = [t * finish for t in totals]
    if refs.column_scale is not None:
        scale = refs.column_scale[0, columns]
        totals = [t * scale for t in totals]
    return totals


def group_of(layout: WeightLayout, segment: Any) -> Any:
    """The group that a segment belongs to."""
    assert layout.group is not None or layout.zero_point == "integer"
    if layout.group is None:
        return jnp.int32(0)
    per_group = layout.group // layout.segment
    return segment if per_group == 1 else segment // per_group


def packed_bytes(ref: Any, index: Any, columns: Any, per_word: int = 4) -> jax.Array:
    """Number `index` of those that int32 words of a column hold; int32, unsigned."""
    bits = 32 // per_word
    word = ref[index // per_word, columns]
    shift = lax.broadcast_in_dim(index % per_word * bits, word.shape, ())
    return lax.shift_right_logical(word, shift) & jnp.int32((1 << bits) - 1)


def read_scale(layout: WeightLayout, ref: Any, group: Any, columns: Any) -> jax.Array:
    """float32 scales of a group."""
    if not layout.packed_scales:
        return ref[group, columns].astype(jnp.float32)
    code = packed_bytes(ref, group, columns, layout.packed_scales)
    if layout.scale_dtype == "uint4":
        return code.astype(jnp.float32)
    if layout.scale_dtype == "float8_e8m0fnu":
        return lax.bitcast_convert_type(code << jnp.int32(23), jnp.float32)
    return e4m3_scale(code, runs_interpreted())


def e4m3_scale(code: jax.Array, interpreted: bool) -> jax.Array:
    """Bits of positive float8_e4m3fn numbers, int32 -> float32."""
    value = lax.bitcast_convert_type(code << jnp.int32(20), jnp.float32) * jnp.float32(2.0**120)
    if not interpreted:
        return value
    # Small ones are subnormal float32 numbers before the product, which XLA on CPU flushes.
    return jnp.where(code < 8, code.astype(jnp.float32) * jnp.float32(2.0**-9), value)
