"""Products of float rows with a quantized weight, in plain XLA, without keeping a decoded copy.

All compute `x @ dequantize(q)` and differ in what reaches memory:

- `fused_product`: all is done in one element-wise fusion, which XLA spreads over the cores of a
  CPU, and one partial sum a block is written. The fastest for one row, by far.
- `plane_product`: decodes the weight, or a tile of its columns under `tiled`, and calls a dot.
- `transposed_split_product`: 8-bit dots, for CPUs with matrix units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.ops.prepared_weight import TransposedWeight
from fdq.ops.weight_view import WeightView, decode_planes, pad_rows

Product = Callable[[jax.Array, WeightView], jax.Array]


def exact_dot(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """`x [M, K]` times w over its `axis` of K, summed in float32; no float32 is rounded to TF32."""
    return lax.dot_general(
        x,
        w,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def fused_product(x: jax.Array, view: WeightView, block_units: int, *, dot: bool) -> jax.Array:
    """float32 `[M, K]` -> `[M, N]`: one element-wise fusion a row over `[blocks, N]`, then a sum.

    A block has `block_units` packed units, or the most below that divide a group. Blocks are summed
    by a `dot` with ones on CPUs, where XLA's reduction takes 4 to 17 times longer.
    """
    # Without the barrier XLA fuses what made x (a quantization, a norm) into every product with it.
    x = lax.optimization_barrier(pad_rows(x, view))
    groups = view.scale.shape[-2]
    per_group = view.units // groups
    block = next(b for b in range(min(block_units, per_group), 0, -1) if per_group % b == 0)
    blocks = per_group // block
    n = view.columns
    codes = view.codes.reshape(groups, blocks, block, view.unit_bytes, n)
    tables = tuple(a[:, None, :] for a in view.tables)
    zero = None if view.zero is None else view.zero[:, None, :]
    scale = (view.scale * view.format.unit_factor)[:, None, :]

    def row(x_row):
        weights = x_row.reshape(groups, blocks, block, view.unit_rows, 1)
        total = jnp.zeros((groups, blocks, n), jnp.float32)
        for j in range(block):
            unit = [codes[:, :, j, i] for i in range(view.unit_bytes)]
            for p, value in enumerate(view.decode_unit(unit, tables)):
                total = total + weights[:, :, j, p] * (value if zero is None else value - zero)
        total = total if groups == 1 else total * scale
        partial = total.reshape(groups * blocks, n)
        if dot:
            y = exact_dot(jnp.ones((1, partial.shape[0]), jnp.float32), partial)
        else:
            y = jnp.sum(partial, axis=0, keepdims=True)
        return y * scale[0] if groups == 1 else y

    return jnp.concatenate([row(x[m]) for m in range(x.shape[0])], axis=0)


def plane_product(x: jax.Array, view: WeightView, dtype: Any = jnp.float32) -> jax.Array:
    """Float `[M, K]` -> float32 `[M, N]`: decodes the planes of the weight, sums one dot a plane.

    Operands of the dots are rounded to `dtype`; a scale per channel is applied after them.
    """
    x, row_scale = pad_rows(x, view), None
    if dtype == jnp.float16 and x.dtype != jnp.float16:
        # Outliers of a bfloat16 model pass 65504; dividing by a power of two rounds nothing.
        x = x.astype(jnp.float32)
        exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=-1, keepdims=True))[1]
        x, row_scale = jnp.ldexp(x, -exponent), exponent
    per_channel = view.scale.shape[-2] == 1
    if dtype == jnp.float16 and not per_channel:
        # Scales relative to the largest of their channel keep weights inside float16's range.
        largest = jnp.max(jnp.abs(view.scale), axis=-2, keepdims=True)
        largest = jnp.where(largest == 0, jnp.float32(1), largest)
        relative = dataclasses.replace(view, scale=view.scale / largest)
        decoded, after = decode_planes(relative), largest
    elif per_channel:
        decoded = decode_planes(view, with_scale=False)
        after = view.scale * view.format.unit_factor
    else:
        decoded, after = decode_planes(view), None
    parts = x.astype(dtype).reshape(x.shape[0], view.units, view.unit_rows)
    y = exact_dot(parts[..., 0], decoded[0].astype(dtype))
    for p in range(1, view.unit_rows):
        y = y + exact_dot(parts[..., p], decoded[p].astype(dtype))
    y = y if after is None else y * after
    return y if row_scale is None else jnp.ldexp(y, row_scale)


def tiled(product: Product, x: jax.Array, view: WeightView, columns: int) -> jax.Array:
    """`product` of tiles of `columns` output channels; the last computes some columns again."""
    n = view.columns
    if n <= columns:
        return product(x, view)

    def body(i, y):
        start = jnp.minimum(i * columns, n - columns)
        tile = product(x, view.slice_columns(start, columns))
        return lax.dynamic_update_slice_in_dim(y, tile, start, axis=1)

    y = jnp.zeros((x.shape[0], n), jnp.float32)
    return lax.fori_loop(0, -(-n // columns), body, y)


_SPLITS = 3  # int8 rows that a float row is split into
# 127 * 2 * 127: a part is rounded to 1/127 of the one before, and the remainder is half a step.
_STEP = 254.0


def transposed_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 `x [M, K]` times `w [N, K]` -> int32 `[M, N]`, padded as in `padded_integer_dot`."""
    # The weight is on the left: the right operand is repacked by the CPU's matrix kernels.
    m = x.shape[0]
    if m == 1:
        x = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
    y = lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return y[:, :m].T


def transposed_split_product(x: jax.Array, w: TransposedWeight) -> jax.Array:
    """Float rows `[M, K]` times a transposed int8 weight -> float32 `[M, N]`, by exact 8-bit dots.

    A row of x is split into three int8 rows, `x = step * (a + b / 254 + c / 254^2)` with
    `step = max|x| / 127`; what is cut off is at most `max|x| * 2^-24`.
    """
    m = x.shape[0]
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = jnp.where(largest == 0, jnp.float32(1), largest)
    rest = x / largest * jnp.float32(127)
    parts = []
    for _ in range(_SPLITS):
        parts.append(jnp.round(rest))
        rest = (rest - parts[-1]) * jnp.float32(_STEP)
    sums = transposed_dot(jnp.concatenate(parts, axis=0).astype(jnp.int8), w.data.codes)
    sums = sums.astype(jnp.float32)
    y = sums[2 * m :] / jnp.float32(_STEP)
    y = (y + sums[m : 2 * m]) / jnp.float32(_STEP) + sums[:m]
    return y * (largest / jnp.float32(127)) * w.data.scale.astype(jnp.float32)
