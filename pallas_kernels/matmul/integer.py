"""Products of int8 activations with integer weights, M = 1 .. 8 rows, by four-byte dots (dp4a).

    y[m, n] = sum_k x[m, k] * (code[k, n] - zero[k // g, n]) * scale[k // g, n]

Codes of 8, 4 and 2 bits come four at a time into the top bits of the bytes of a word, signed: a
shift, one three-input logical instruction, and one dp4a for each row of x. That is 0.6 instructions
a weight for int4 and one row, where decoding to float32 takes 2.3, and the sums are exact: int32
over a group, over the whole column where it has one scale.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.device import MOST_ROWS
from pallas_kernels.matmul.core import (
    Tile,
    WeightRefs,
    group_of,
    kernel_operands,
    packed_bytes,
    read_scale,
)
from pallas_kernels.matmul.matrix_vector import (
    MatrixVectorConfig,
    choose_config,
    kernel_name,
    multiprocessors,
    rows_of_a_batch,
    tile_of,
)
from pallas_kernels.mosaic.lane_instructions import apply, assembly_bits
from pallas_kernels.mosaic.launch import THREADS, launch, load, runs_interpreted, store
from pallas_kernels.transformations import batchable
from pallas_kernels.typing import Array, Float, Int
from pallas_kernels.weights.decoded_weight import decoded_weight
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.word_format import rows_together


def integer_matrix_vector_reference(x: Int[Array, "m k"], w: KernelWeight) -> Float[Array, "1 m n"]:
    """The meaning of `integer_matrix_vector`, in float32: `[1, M, N]`."""
    return lax.dot(x.astype(jnp.float32), decoded_weight(w), precision=lax.Precision.HIGHEST)[None]


def integer_matrix_vector(
    x: jax.Array, w: KernelWeight, *, config: MatrixVectorConfig | None = None
) -> Float[Array, "split m n"]:
    """Partial sums of int8 rows times an integer weight that `has_kernel`, as `matrix_vector`'s.

    The rows' own scales are not applied. Shapes, dtypes and formats that do not fit are a
    ValueError.
    """
    if x.ndim != 2 or x.dtype != jnp.int8 or not 1 <= x.shape[0] <= MOST_ROWS:
        raise ValueError(
            f"integer_matrix_vector: expected int8 x [M, K] of 1 .. {MOST_ROWS} rows, found "
            f"{x.dtype.name} {x.shape}; use XLA for more rows."
        )
    m, k = x.shape
    if not has_kernel(w) or w.words.ndim != 2 or k != w.layout.k:
        raise ValueError(
            f"integer_matrix_vector: x {x.shape} needs a weight [K={k}, N] whose codes fill "
            f"bytes, found {w.layout.format} {w.shape}."
        )
    if config is None:
        config = choose_config(w.layout, m, multiprocessors())
    kernel = functools.partial(_integer_matrix_vector, config=config)
    return batchable(kernel, rows_of_a_batch(kernel, config))(x, w)


def has_kernel(w: KernelWeight) -> bool:
    """Whether a weight's codes fill bytes, and its groups more than one unit of them.

    Codes of 3 bits do not: their products decode to floats.
    """
    return w.layout.words.byte_rows is not None and w.layout.segment_units > 1


def x_words(x: Int[Array, "m k"], w: KernelWeight) -> Int[Array, "units planes m"]:
    """int8 `[M, K]` -> int32 `[units, planes, M]`, four codes a word as planes hold theirs."""
    layout = w.layout
    order = layout.words.byte_rows
    assert order is not None
    missing = layout.segments * layout.segment - x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, missing)]) if missing else x
    x = rows_together(x.reshape(x.shape[0], -1, layout.words.rows), order)
    return lax.bitcast_convert_type(jnp.moveaxis(x, 0, 2), jnp.int32)


def dot4(a: jax.Array, b: jax.Array, c: jax.Array, layout: Any) -> jax.Array:
    """`c` plus the four products of signed bytes of `a` and `b`; int32, of one shape."""
    if runs_interpreted():
        return dot4_reference(a, b, c)
    emit = functools.partial(assembly_bits, "dp4a.s32.s32 $0, $1, $2, $3;")
    return apply(lambda *words: [emit(*words)], (a, b, c), (jnp.int32,), layout)[0]


def dot4_reference(
    a: Int[Array, "*s"], b: Int[Array, "*s"], c: Int[Array, "*s"]
) -> Int[Array, "*s"]:
    """The meaning of dp4a: each byte is sign-extended by shifts."""
    for i in range(4):
        left, right = jnp.full_like(a, 24 - 8 * i), jnp.full_like(a, 24)
        c = c + ((a << left) >> right) * ((b << left) >> right)
    return c


@functools.partial(jax.jit, static_argnames=("config",))
def _integer_matrix_vector(x, w, *, config) -> jax.Array:
    layout = w.layout
    m = x.shape[0]
    tile, split = tile_of(layout, m, config)
    operands, name_refs = kernel_operands(w)

    def body(x_ref, *refs):
        *weight_refs, out_ref = refs
        first_segment = lax.axis_index("split") * tile.segments
        first_column = pl.multiple_of(lax.axis_index("columns") * tile.columns, tile.columns)
        totals = _accumulate(tile, name_refs(weight_refs), first_column, first_segment, x_ref)
        columns = pl.ds(first_column, tile.columns)
        store(out_ref.at[lax.axis_index("split"), :, columns], totals)

    body.__name__ = kernel_name("integer_matrix_vector", layout, m)
    out = launch(
        body,
        (x_words(x, w), *operands),
        out_type=jax.ShapeDtypeStruct((split, m, layout.padded_n), jnp.float32),
        grid=(layout.padded_n // tile.columns, split),
        grid_names=("columns", "split"),
    )
    return out[..., : layout.n]


def _accumulate(
    tile: Tile, refs: WeightRefs, first_column: Any, first_segment: Any, x_ref: Any
) -> jax.Array:
    """Partial sums of the block: float32 `[M, columns]`, scales applied."""
    layout = tile.layout
    bits = layout.words.bits
    units = layout.segment_units
    step = min(max(tile.step, 2), units)
    columns = pl.ds(first_column, tile.columns)
    shape = (step, tile.rows, tile.columns)
    vector = tile.columns // THREADS
    tiling = mg.Tiling((shape, (32 * vector,), (vector,)))  # neighbouring columns are a thread's
    products = mg.Layout.TILED(tiling, (-3,), (-2,), -1)
    fields, staged = products.reduce(1), products.reduce(2)  # [U, columns], [U, M]
    totals_layout = products.reduce(0)  # [M, columns]
    column = totals_layout.reduce(0)
    factor = jnp.float32(2.0 ** (bits - 8))
    with_sums = layout.zero_point != "none"

    def of_column(ref, index):
        return load(ref.at[index, columns], column)

    def zeros(shape, dtype, layout_):
        return mg.layout_cast(jnp.zeros(shape, dtype), layout_)

    def one_step(segment, t, parts, sums):
        start = (first_segment + segment) * units + t * step
        rows = pl.ds(start, step)
        word = load(refs.words.at[rows, 0, columns], fields)
        for i, plane in enumerate(layout.words.signed_planes(word)):
            x = load(x_ref.at[rows, i], staged)
            wide = lax.broadcast_in_dim(x, shape, (0, 1))
            parts = dot4(lax.broadcast_in_dim(plane, shape, (0, 2)), wide, parts, products)
            if with_sums:
                ones = mg.layout_cast(jnp.full(x.shape, 0x01010101, jnp.int32), staged)
                sums = dot4(x, ones, sums, staged)
        return parts, sums

    def segment_sums(segment, parts, sums):
        if units == step:
            return one_step(segment, 0, parts, sums)
        return lax.fori_loop(
            0, units // step, lambda t, carry: one_step(segment, t, *carry), (parts, sums)
        )

    nothing = zeros(shape, jnp.int32, products)
    no_sums = zeros(shape[:2], jnp.int32, staged) if with_sums else ()
    # Segments unrolled: many rows have enough to do in one.
    together = math.gcd(tile.segments, max(1, 32 // (units * max(1, tile.rows // 2))))

    def finish(segment, parts, sums):
        """The float32 value of finished integer sums, without scale."""
        total = jnp.sum(parts, axis=0).astype(jnp.float32) * factor
        if not with_sums:
            return total
        sums = jnp.sum(sums, axis=0).astype(jnp.float32)
        sums = lax.broadcast_in_dim(sums, total.shape, (0,))
        if layout.zero_point == "half":
            return total + sums * jnp.float32(0.5)
        group = group_of(layout, first_segment + segment)
        zero = packed_bytes(refs.zero, group, of_column) - jnp.int32(1 << (bits - 1))
        zero = lax.broadcast_in_dim(zero.astype(jnp.float32), total.shape, (1,))
        return total - sums * zero

    if layout.group is None:

        def column_body(i, carry):
            for s in range(together):
                carry = segment_sums(i * together + s, *carry)
            return carry

        start = (nothing, no_sums)
        parts, sums = lax.fori_loop(0, tile.segments // together, column_body, start)
        totals = finish(jnp.int32(0), parts, sums)
    else:

        def group_body(i, totals):
            for s in range(together):
                segment = i * together + s
                parts, sums = segment_sums(segment, nothing, no_sums)
                group = group_of(layout, first_segment + segment)
                scale = read_scale(layout, refs.scale, group, of_column)
                scale = lax.broadcast_in_dim(scale, totals.shape, (1,))
                totals = totals + finish(segment, parts, sums) * scale
            return totals

        start = zeros((tile.rows, tile.columns), jnp.float32, totals_layout)
        totals = lax.fori_loop(0, tile.segments // together, group_body, start)
    if refs.column_scale is not None:
        scale = of_column(refs.column_scale, 0)
        totals = totals * lax.broadcast_in_dim(scale, totals.shape, (1,))
    return totals
