"""Whole weights decoded from the kernels' layout, for the matrix products of libraries.

    out[k, n] = (code[k, n] - bias - zero[group, n]) * scale[group, n] * factor[n]

Above a few rows tensor cores bound a product, and nothing multiplies plain matrices faster than
cuBLAS: a weight is written once, as that wants it, and read by the product right after, partly
still from the L2 cache. Memory bounds this kernel: a program reads the words of a block of columns,
128 rows or so, and writes rows of neighbouring columns. What multiplies whole columns
(`column_scale`) is left to the sum, so that codes with scales per channel are written exactly.

Of a stack of experts those without rows are skipped: what is returned in their place is anything.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul.core import (
    WeightRefs,
    group_of,
    kernel_operands,
    packed_bytes,
    read_scale,
)
from pallas_kernels.matmul.matrix_vector import kernel_name
from pallas_kernels.mosaic.lane_instructions import column_layout
from pallas_kernels.mosaic.launch import launch, load, runs_interpreted, store
from pallas_kernels.typing import Array, Float, Int
from pallas_kernels.weights.decoded_weight import decoded_weight
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.layout import WeightLayout

_ROWS = 128
"""Of K that a program decodes, or one segment."""


def decode_weight_reference(
    w: KernelWeight, dtype: Any, *, factor: jax.Array | None = None
) -> Float[Array, "*lead k n"]:
    """The meaning of `decode_weight`, of the columns and rows that are no padding."""
    one = jnp.ones((*w.words.shape[:-2], 1, w.layout.padded_n), jnp.float32)
    plain = decoded_weight(KernelWeight(**{**vars(w), "column_scale": one}))
    if factor is not None:
        plain = plain * factor[..., : w.layout.n]
    return plain.astype(dtype)


def decode_weight(
    w: KernelWeight,
    dtype: Any,
    *,
    after: jax.Array | None = None,
    factor: Float[Array, "*lead 1 padded"] | None = None,
    counts: Int[Array, " e"] | None = None,
    experts: tuple[int, int] | None = None,
) -> Float[Array, "*some rows padded"]:
    """The weight before `column_scale`, rounded to `dtype`: `[..., K', N']`.

    K' is K rounded up to whole segments, N' is N rounded up to 128; what stands there is finite.

    Args:
      w: `[K, N]`, or a stack `[E, K, N]`.
      dtype: bfloat16, float16 or float32.
      after: an array that exists before this runs: in a program with many weights each is decoded
        for its product only then, in the memory of the one before.
      factor: float32 `[..., 1, N']`, multiplied by what is decoded.
      counts: of a stack, int32 `[E]`; experts with 0 are left out.
      experts: of a stack, the first and how many to decode; all by default.
    """
    dtype = jnp.dtype(dtype)
    stacked = w.words.ndim == 3
    if w.words.ndim not in (2, 3) or (not stacked and not (counts is None and experts is None)):
        raise ValueError(
            f"decode_weight: expected a weight [K, N], or a stack [E, K, N] for counts and "
            f"experts, found {w.shape}."
        )
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"decode_weight: dtype {dtype}, expected 16-bit floats or float32.")
    first, count = experts or (0, w.shape[0] if stacked else 1)
    if stacked and not 0 <= first < first + count <= w.shape[0]:
        raise ValueError(f"decode_weight: experts {experts} of a stack of {w.shape[0]}.")
    return _transformable(dtype.name, first, count)(w, after, factor, counts)


def _transformable(dtype: str, first: int, count: int):
    """The launch with a rule for vmap: a batch of what it runs after alone changes nothing."""

    @jax.custom_batching.custom_vmap
    def run(w, after, factor, counts):
        return _decode(w, after, factor, counts, dtype=dtype, first=first, count=count)

    @run.def_vmap
    def _rule(axis_size, batched, w, after, factor, counts):
        if not any(jax.tree.leaves((batched[0], *batched[2:]))):
            return run(w, after, factor, counts), False
        leaves, tree = jax.tree.flatten((w, factor, counts))
        which = jax.tree.leaves((batched[0], *batched[2:]))

        def one(some):
            some = iter(some)
            arrays = [next(some) if b else a for a, b in zip(leaves, which, strict=True)]
            weight, *others = jax.tree.unflatten(tree, arrays)
            return run(weight, after, *others)

        return lax.map(one, [a for a, b in zip(leaves, which, strict=True) if b]), True

    return run


def block_columns(layout: WeightLayout) -> int:
    """Columns of a program: four, two or one a thread."""
    return next(block for block in (512, 256, 128) if layout.padded_n % block == 0)


@functools.partial(jax.jit, static_argnames=("dtype", "first", "count"))
def _decode(w, after, factor, counts, *, dtype, first, count) -> jax.Array:
    layout, dtype = w.layout, jnp.dtype(dtype)
    stacked = w.words.ndim == 3
    columns, segment = block_columns(layout), layout.segment
    together = math.gcd(layout.segments, max(1, _ROWS // segment))
    rows = layout.segments * segment
    weight_operands, name_refs = kernel_operands(w)
    extra = [a for a in (factor, counts, after) if a is not None]
    run = functools.partial(_decode_block, layout, together)

    def body(*refs):
        *inputs, out_ref = refs
        weight_refs = name_refs(inputs[: len(weight_operands)])
        others = iter(inputs[len(weight_operands) :])
        factor_ref = None if factor is None else next(others)
        counts_ref = None if counts is None else next(others)
        place = pl.multiple_of(lax.axis_index("columns") * columns, columns)
        segments = lax.axis_index("segments") * together
        if not stacked:
            run(weight_refs, factor_ref, place, columns, segments, out_ref)
            return
        expert = lax.axis_index("experts")

        def of_expert():
            own = weight_refs.expert(first + expert)
            of_factor = None if factor_ref is None else factor_ref.at[first + expert]
            run(own, of_factor, place, columns, segments, out_ref.at[expert])

        if counts_ref is None:
            of_expert()
        else:
            pl.when(counts_ref[first + expert] > 0)(of_expert)

    name = kernel_name("decode", layout, 1).removesuffix("_m1")
    body.__name__ = f"{name}_to_{dtype.name}"
    grid = (layout.padded_n // columns, layout.segments // together)
    shape = (rows, layout.padded_n)
    return launch(
        body,
        (*weight_operands, *extra),
        out_type=jax.ShapeDtypeStruct((count, *shape) if stacked else shape, dtype),
        grid=(*grid, count) if stacked else grid,
        grid_names=("columns", "segments", "experts")[: 2 + stacked],
    )


def _decode_block(
    layout: WeightLayout,
    segments: int,
    refs: WeightRefs,
    factor_ref: Any,
    first_column: Any,
    width: int,
    first_segment: Any,
    out_ref: Any,
) -> None:
    """So many segments of a block of columns."""
    words, kind = layout.words, column_layout(width)
    interpreted = runs_interpreted()
    columns = pl.ds(first_column, width)
    units = layout.segment_units

    def of_column(ref, index):
        return load(ref.at[index, columns], kind)

    constants = [of_column(ref, 0) for ref in refs.constants]
    factor = None if factor_ref is None else of_column(factor_ref, 0)
    # One power of two may be beyond float32: fields are 2^-149 of what they stand for.
    last = jnp.float32(math.ldexp(1.0, words.exponent(interpreted)))
    powers = [math.ldexp(1.0, exponent) for exponent in words.exponents(interpreted)]

    def one_segment(i, _):
        segment = first_segment + i
        group = group_of(layout, segment)
        shift, scale = None, factor
        if layout.zero_point == "integer":
            shift = packed_bytes(refs.zero, group, of_column).astype(jnp.float32)
        if layout.group is not None:
            of_group = read_scale(layout, refs.scale, group, of_column)
            scale = of_group if scale is None else of_group * scale

        def one_unit(unit, _):
            at = segment * units + unit
            fetched = [load(refs.words.at[at, j, columns], kind) for j in range(words.words)]
            decoded = words.decode(fetched, constants, interpreted, kind)
            for row, (value, power) in enumerate(zip(decoded, powers, strict=True)):
                value = value * jnp.float32(power) * last if power != 1.0 else value * last
                if layout.bias:
                    value = value - jnp.float32(layout.bias)
                value = value if shift is None else value - shift
                value = value if scale is None else value * scale
                store(out_ref.at[at * words.rows + row, columns], value.astype(out_ref.dtype))
            return ()

        return lax.fori_loop(0, units, one_unit, ())

    lax.fori_loop(0, segments, one_segment, ())
