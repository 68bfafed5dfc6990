"""Products with a quantized weight on tensor cores (`mma.sync`, sm_80 and newer): 1 to 64 rows.

    y[m, n] = sum_k x[m, k] * w[k, n]

It reads the words that `matrix_vector` reads. A weight is decoded once for all rows, to exact
16-bit floats of its code minus zero point; products and sums are float32 (the tensor cores'), the
scale of a group multiplies its sum. Eight more rows cost a fifth of an instruction a weight. Rows
of int8 multiply integers without floats (`mma_integers`), and their sums are exact.

Instructions of the hot loop a weight (4096 x 6144 on an H100, from machine code): int4 in groups of
128 1.8, 2.1, 2.5 and 3.3 at 8, 16, 32 and 64 rows; at 16 rows int8 2.3, int3 2.1, int2 1.8, fp8
3.1, mxfp4 and nvfp4 3.3, cc2 3.6, mxfp8 4.7 and nf4 4.2. The levels of nf4 are sums of two 16-bit
floats, in bfloat16 within 2^-17.

A program is four warps with 128 or 256 columns and a slice of K, whose sums go to their own row of
`[split, M, N]`, as `matrix_vector`'s do. There is no shared memory and no barrier: words of the
next steps are in registers, x comes from the first-level cache, arranged by XLA (`paired`), which
also finishes rows that are `Gated` or `Normed`, once for all programs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.device import MOST_MMA_ROWS, default_device
from pallas_kernels.matmul import mma_integers as integers
from pallas_kernels.matmul import mma_products as mma
from pallas_kernels.matmul.core import (
    WeightRefs,
    group_of,
    kernel_operands,
    packed_bytes,
    read_scale,
)
from pallas_kernels.matmul.matrix_vector import kernel_name, multiprocessors, whole_split
from pallas_kernels.matmul.row_sources import Rows, finished, rows_cotangent, rows_shape
from pallas_kernels.mosaic.launch import launch, load, store
from pallas_kernels.transformations import batchable, differentiable
from pallas_kernels.typing import Array, Float
from pallas_kernels.weights.decoded_weight import decoded_weight
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.layout import WeightLayout

_SCALED_SEGMENTS = 8
"""Groups with scales that are multiplied into the weight, taken together: two words of scales."""

_AHEAD = 4  # steps whose words are on their way


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmaConfig:
    """How a product is cut into programs."""

    block_columns: int  # of a program: 128 or 256; 128 where sums of more rows need the registers
    split: int  # slices of K; rounded down to a divisor of the segments of a column


def unsupported(layout: WeightLayout, dtype: Any) -> str | None:
    """Why tensor cores do not multiply such a weight with rows of `dtype`; None if they do."""
    capability = str(getattr(default_device(), "compute_capability", "8.0"))
    if capability.partition(".")[0] in ("5", "6", "7"):
        return "GPUs before sm_80 have no mma.sync of this kind"
    if layout.words.paired_rows is None:
        return f"there is no form of {layout.format} for tensor cores"
    if layout.words.scaled_fragments:
        found = layout.segment_units, layout.segments % _SCALED_SEGMENTS, layout.scale_dtype
        if found != (2, 0, "float8_e4m3fn"):
            return f"{layout.format} has groups of two units, and K a multiple of 128 rows of them"
    elif layout.segment_units % mma.UNITS:
        return (
            f"scales of {layout.segment} rows of {layout.format} are of "
            f"{layout.segment_units} units, and tensor cores take {mma.UNITS} at a time"
        )
    if jnp.dtype(dtype) == jnp.int8 and layout.words.byte_rows is not None:
        return None
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        more = ", or int8" if layout.words.byte_rows is not None else ""
        return f"tensor cores take rows of bfloat16 or float16{more}, found {jnp.dtype(dtype).name}"
    return None


def mma_matmul(
    x: Rows, w: KernelWeight, *, config: MmaConfig | None = None
) -> Float[Array, "split m n"]:
    """Partial sums of `x @ w`, to be added up over the first axis: float32 `[split, M, N]`.

    x is bf16 or f16 `[M, K]`, M at most 64; or `Gated` or `Normed`; or int8, for weights whose
    codes fill bytes. The meaning is that of `matrix_vector_reference`. There is a gradient with
    respect to x of floats, not to w. What does not fit is a ValueError.
    """
    m, k = rows_shape(x, "mma_matmul", int8=True)
    if w.words.ndim != 2 or k != w.layout.k:
        raise ValueError(f"mma_matmul: x {(m, k)} needs a weight [K={k}, N], found {w.shape}.")
    if not 1 <= m <= MOST_MMA_ROWS:
        raise ValueError(f"mma_matmul: x has {m} rows, expected 1 .. {MOST_MMA_ROWS}.")
    if reason := unsupported(w.layout, x.dtype):
        raise ValueError(f"mma_matmul: {reason}.")
    if config is None:
        config = choose_mma_config(w.layout, m, multiprocessors())
    check_mma_config(config, "mma_matmul")
    kernel = functools.partial(_mma_matmul, config=config)

    def fold(axis_size, batched, x, w):
        if not isinstance(x, jax.Array) or any(jax.tree.leaves(batched[1])):
            return None
        m, k = x.shape[1:]
        if axis_size * m > MOST_MMA_ROWS:
            return None
        out = kernel(x.reshape(axis_size * m, k), w)
        return jnp.moveaxis(out.reshape(out.shape[0], axis_size, m, -1), 1, 0)

    def gradient(cotangent, x, w):
        return rows_cotangent(cotangent, x, w, decoded_weight(w)), None

    return differentiable(batchable(kernel, fold), gradient)(x, w)


def check_mma_config(config: MmaConfig, caller: str) -> None:
    """Raises ValueError."""
    if config.block_columns not in (128, 256) or config.split < 1:
        raise ValueError(f"{caller}: expected block_columns 128 or 256, split >= 1: {config}.")


def choose_mma_config(layout: WeightLayout, m: int, multiprocessors: int) -> MmaConfig:
    """The default for a device that nobody tuned for.

    256 columns read x half as often; K is split until there are programs enough to hide memory's
    latency (registers allow four on a multiprocessor, two with more rows), and less with more rows,
    whose partial sums are traffic.
    """
    columns = layout.padded_n
    block = 256 if m <= 32 and columns % 256 == 0 and columns >= 256 * multiprocessors // 4 else 128
    programs, most = (4, 8) if m <= 16 else (3, 8) if m <= 32 else (2, 4)
    split = min(-(-programs * 128 * multiprocessors // columns), most)
    return MmaConfig(block_columns=block, split=whole_split(layout.segments, split))


@dataclasses.dataclass(frozen=True)
class MmaTile:
    """What one program computes; static."""

    layout: WeightLayout
    rows: int  # M, whole eights
    chunks: int  # of 128 columns
    segments: int  # of K in the slice, as they are taken here (see `units`)
    dtype: Any  # of x

    @property
    def units(self) -> int:
        """Of a segment as it is taken here."""
        together = _SCALED_SEGMENTS if self.layout.words.scaled_fragments else 1
        return self.layout.segment_units * together

    @property
    def steps(self) -> int:
        """Of a segment, four units each."""
        return self.units // mma.UNITS

    @property
    def together(self) -> int:
        """Segments of an iteration, so that it has as many steps as are on their way."""
        return math.gcd(self.segments, max(1, _AHEAD // self.steps))

    @property
    def ahead(self) -> int:
        """Steps whose words are on their way: those of an iteration or a part of them."""
        wanted = _AHEAD if self.layout.words.words == 1 else 1
        return math.gcd(self.together * self.steps, wanted)


def tile_of(layout: WeightLayout, m: int, dtype: Any, config: MmaConfig) -> tuple[MmaTile, int]:
    """What one program computes, and how many share a column."""
    rows = -(-m // mma.ROWS) * mma.ROWS
    narrow = rows > 32 or layout.padded_n % config.block_columns
    segments = layout.segments // (_SCALED_SEGMENTS if layout.words.scaled_fragments else 1)
    split = whole_split(segments, config.split)
    chunks = 1 if narrow else config.block_columns // mma.COLUMNS
    return MmaTile(layout, rows, chunks, segments // split, dtype), split


@functools.partial(jax.jit, static_argnames=("config",))
def _mma_matmul(x, w, *, config) -> jax.Array:
    layout, m = w.layout, x.shape[0]
    rows = finished(x)
    tile, split = tile_of(layout, m, rows.dtype, config)
    operands, name_refs = kernel_operands(w)
    block = tile.chunks * mma.COLUMNS

    def body(x_ref, *refs):
        *weight_refs, out_ref = refs
        part = lax.axis_index("split")
        first = pl.multiple_of(lax.axis_index("columns") * block, block)
        totals = accumulate(tile, name_refs(weight_refs), x_ref, first, part * tile.segments)
        store_totals(out_ref.at[part], totals, first)

    body.__name__ = kernel_name("mma_matmul", layout, m)
    out = launch(
        body,
        (arranged(rows, layout), *operands),
        out_type=jax.ShapeDtypeStruct((split, tile.rows, layout.padded_n), jnp.float32),
        grid=(layout.padded_n // block, split),
        grid_names=("columns", "split"),
    )
    return out[:, :m, : layout.n]


def arranged(x: jax.Array, layout: WeightLayout) -> jax.Array:
    """Rows `[M, K]` as `mma_products.paired` or `mma_integers.byte_words`, zeros beyond K."""
    missing = layout.segments * layout.segment - x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, missing)]) if missing else x
    return (integers.byte_words if x.dtype == jnp.int8 else mma.paired)(x, layout.words)


def store_totals(out_ref: Any, totals: list[jax.Array], first_column: Any) -> None:
    """What `accumulate` returns to `[M, N']`."""
    for c, total in enumerate(totals):
        columns = pl.ds(first_column + c * mma.COLUMNS, mma.COLUMNS)
        store(out_ref.at[:, columns], mma.turned(total))


def accumulate(
    tile: MmaTile, refs: WeightRefs, x_ref: Any, first_column: Any, first_segment: Any
) -> list[jax.Array]:
    """Partial sums of each 128 columns: float32 `[128, M]`, scales applied.

    `refs` are of one weight, without leading axes; `x_ref` is of `arranged`.
    """
    layout, words = tile.layout, tile.layout.words
    units = tile.units
    scaled = words.scaled_fragments  # scales are part of the weights, not of sums
    grouped = layout.group is not None and not scaled
    integer = tile.dtype == jnp.int8
    # What is subtracted from codes is part of floats; of integers it is added to their sums.
    corrected = integer and layout.zero_point != "none"
    by_segment = grouped or corrected
    # Fragments are powers of two of codes.
    factor = 2.0 ** (words.bits - 8 if integer else -words.fragment_exponent(tile.dtype))
    first_unit = first_segment * units
    last_unit = first_unit + tile.segments * units - mma.UNITS
    columns = [pl.ds(first_column + c * mma.COLUMNS, mma.COLUMNS) for c in range(tile.chunks)]
    zero_layout, rows_layout = mma.column_layout(), mma.row_layout(x_ref.shape[-1])

    def reader(chunk):
        def of_column(ref, index):
            return load(ref.at[index, columns[chunk]], zero_layout)

        return of_column

    readers = [reader(c) for c in range(tile.chunks)]
    constants = [[read(ref, 0) for ref in refs.constants] for read in readers]

    def fetch(unit):
        some = pl.ds(jnp.minimum(unit, last_unit), mma.UNITS)
        return [
            [load(refs.words.at[some, i, c], mma.word_layout()) for i in range(words.words)]
            for c in columns
        ]

    def zeros(dtype=jnp.int32 if integer else jnp.float32):
        return mg.layout_cast(jnp.zeros((mma.COLUMNS, tile.rows), dtype), mma.sum_layout())

    def of_columns(value):
        return mg.layout_cast(jnp.full((mma.COLUMNS,), value, jnp.float32), zero_layout)

    def zero_of(read, group):
        """What is subtracted from codes; of integers, what is added to fragments."""
        zero = None
        if layout.zero_point == "integer":
            zero = packed_bytes(refs.zero, group, read).astype(jnp.float32)
        if not corrected:
            return zero
        if zero is None:
            return of_columns(0.5 / factor)
        return (jnp.float32(2.0 ** (words.bits - 1)) - zero) * jnp.float32(1 / factor)

    def multiply(c, sums, fetched, x, zero, scales):
        if integer:
            return integers.multiply_bytes(sums, words.signed_planes(fetched[0]), x)
        return mma.multiply(
            sums,
            fetched,
            x,
            words,
            tile.dtype,
            columns=constants[c],
            middle=layout.bias,
            zero=zero,
            scales=scales,
        )

    def end_segment(total, sums, scale, zero, row_sums):
        if not integer:
            return mma.add_scaled(total, sums, scale)
        scale = of_columns(factor) if scale is None else scale * jnp.float32(factor)
        return integers.add_scaled_integers(total, sums, scale, zero, row_sums)

    def one_segment(segment, totals, fetched):
        start = first_unit + segment * units
        group = group_of(layout, first_segment + segment)
        words_of_scales = (first_segment + segment) * (_SCALED_SEGMENTS // 4)
        scales: list[Any] = [None] * tile.chunks
        if grouped:
            scales = [read_scale(layout, refs.scale, group, read) for read in readers]
        points = [zero_of(read, group) for read in readers]
        sums = [zeros() for _ in totals] if by_segment else totals
        row_sums = zeros() if corrected else None
        for step in range(tile.steps):
            unit = start + step * mma.UNITS
            following = fetch(unit + tile.ahead * mma.UNITS)
            x = load(x_ref.at[pl.ds(unit, mma.UNITS)], rows_layout)
            own: list[Any] = [None] * tile.chunks
            if scaled:
                own = [
                    (read(refs.scale, words_of_scales + step // 2), step % 2) for read in readers
                ]
            if row_sums is not None:
                row_sums = integers.add_row_sums(row_sums, x)
            sums = [
                multiply(c, sums[c], fetched[0][c], x, points[c], own[c])
                for c in range(tile.chunks)
            ]
            fetched = [*fetched[1:], following]
        if by_segment:
            parts = zip(totals, sums, scales, points, strict=True)
            sums = [end_segment(*part, row_sums) for part in parts]
        return sums, fetched

    def body(i, carry):
        totals, fetched = carry
        for s in range(tile.together):
            totals, fetched = one_segment(i * tile.together + s, totals, fetched)
        return totals, fetched

    start = [fetch(first_unit + i * mma.UNITS) for i in range(tile.ahead)]
    nothing = zeros(jnp.float32) if by_segment else zeros()
    carry = [nothing for _ in range(tile.chunks)], start
    totals, _ = lax.fori_loop(0, tile.segments // tile.together, body, carry)
    finished_integers = integer and not by_segment
    rest = 1.0 if integer and by_segment else factor
    results = []
    for read, total in zip(readers, totals, strict=True):
        scale = of_columns(rest)
        if refs.column_scale is not None:
            scale = read(refs.column_scale, 0) * jnp.float32(rest)
        add = integers.add_scaled_integers if finished_integers else mma.add_scaled
        results.append(add(zeros(jnp.float32), total, scale))
    return results
