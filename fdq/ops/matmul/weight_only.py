"""Products of float rows with a quantized weight by dots, without keeping a decoded copy.

All compute `x @ dequantize(q)`: `plane_product` decodes the weight, or a part of it under `tiled`
(columns) and `blocked` (rows of K), and calls a dot; `split_product` and `transposed_product` split
the rows of x into int8 ones and let 8-bit dots do the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.ops.activation import integer_product
from fdq.ops.dots import exact_dot, join_rows, left_dot, split_rows
from fdq.ops.prepared_weight import TransposedWeight
from fdq.ops.weight_view import WeightView, add_offsets, decode_planes, pad_rows

Product = Callable[[jax.Array, WeightView], jax.Array]


def plane_product(
    x: jax.Array,
    view: WeightView,
    dtype: Any = jnp.float32,
    *,
    joined: bool = False,
    looked_up: bool = False,
) -> jax.Array:
    """Float `[M, K]` -> float32 `[M, N]`: decodes the planes of the weight, sums one dot a plane.

    Operands of the dots are rounded to `dtype`; a scale (and offset) per channel is applied after
    them. With `joined` there is one dot over the planes one below the other: for parts of K so
    small that the dots of planes would be too short. `looked_up` as in `decode_planes`.
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
        if view.offset is not None:
            of_offset = jnp.max(jnp.abs(view.offset), axis=-2, keepdims=True)
            largest = jnp.maximum(largest, of_offset)
        largest = jnp.where(largest == 0, jnp.float32(1), largest)
        offset = None if view.offset is None else view.offset / largest
        relative = dataclasses.replace(view, scale=view.scale / largest, offset=offset)
        decoded, after = decode_planes(relative, looked_up=looked_up), largest
    elif per_channel:
        decoded = decode_planes(view, with_scale=False, looked_up=looked_up)
        after = view.scale * view.format.unit_factor
    else:
        decoded, after = decode_planes(view, looked_up=looked_up), None
    parts = x.astype(dtype).reshape(x.shape[0], view.units, view.unit_rows)
    planes = [plane.astype(dtype) for plane in decoded]
    if joined:
        rows = jnp.concatenate([parts[..., p] for p in range(view.unit_rows)], axis=1)
        y = exact_dot(rows, jnp.concatenate(planes, axis=0))
    else:
        y = exact_dot(parts[..., 0], planes[0])
        for p in range(1, view.unit_rows):
            y = y + exact_dot(parts[..., p], planes[p])
    y = y if after is None else y * after
    y = add_offsets(y, x, view) if per_channel else y
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


# 4 MB of floats stay in the caches of the CPUs that this was measured on.
_LARGEST_BLOCK = 2**20
_FEWEST_ROWS = 32


def blocked(product: Product, x: jax.Array, view: WeightView, rows: int) -> jax.Array:
    """The sum of `product` over blocks of `rows` rows of K, or of the whole groups in them.

    Fewer rows where there are many columns; tiles of them, which are copied, only where these are
    too many for a few rows or for one group.
    """
    x = pad_rows(x, view)
    groups = view.scale.shape[-2]
    group_rows = view.rows // groups if groups > 1 else 1
    columns = 2 * _LARGEST_BLOCK // min(rows, max(_FEWEST_ROWS, group_rows))
    if view.columns > columns:
        # As many in each, for the last tile computes again what it lacks.
        even = -(-view.columns // -(-view.columns // columns))
        return tiled(lambda x, tile: blocked(product, x, tile, rows), x, view, -(-even // 64) * 64)
    rows = min(rows, _LARGEST_BLOCK // view.columns)
    # What can be cut: groups, or units where one scale rules them all.
    parts = groups if groups > 1 else view.units
    size = min(max(1, rows * parts // view.rows), parts)
    units = view.units // parts * size

    def at(start: Any, count: int) -> jax.Array:
        some = lax.dynamic_slice_in_dim(x, start * view.unit_rows, count * view.unit_rows, axis=1)
        return product(some, view.slice_units(start, count))

    blocks, rest = divmod(view.units, units)
    y = jnp.zeros((x.shape[0], view.columns), jnp.float32)
    y = lax.fori_loop(0, blocks, lambda i, y: y + at(i * units, units), y)
    return y + at(blocks * units, rest) if rest else y


def split_product(x: jax.Array, view: WeightView) -> jax.Array:
    """Float `[M, K]` times integer codes by exact 8-bit dots -> float32 `[M, N]`."""
    rows, step = split_rows(x)
    return join_rows(integer_product(rows, view)) * step


def transposed_product(x: jax.Array, w: TransposedWeight) -> jax.Array:
    """Float `[M, K]` times a transposed int8 weight by exact 8-bit dots -> float32 `[M, N]`."""
    rows, step = split_rows(x)
    y = join_rows(left_dot(w.data.codes, rows)) * step
    return y * w.data.scale.astype(jnp.float32)
