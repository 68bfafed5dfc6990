"""Rows of a quantized weight: `take` decodes the ones asked for, `transposed_product` all in turn.

That is what an embedding does with its table `[vocab, features]`: a row for each token, and, where
the output head is tied, the product with the transpose.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdq.formats import row_order
from fdq.formats.qtensor import QuantizedWeight, dequantize, differentiable, materialize
from fdq.ops.dots import exact_dot
from fdq.ops.indices import as_indices
from fdq.ops.matmul.derivative import wide_dtype
from fdq.ops.matmul.product import as_dtype, as_rows, as_weight
from fdq.ops.placement import in_auto_axes, mesh_of, spec_entries, spec_entry
from fdq.ops.prepared_weight import TransposedWeight, WordsWeight
from fdq.ops.weight_view import WeightView, decode_planes, view_weight, view_words

TILE_WEIGHTS = 1 << 20
"""Weights decoded at a time: 4 MB in float32, which a CPU's cache holds."""


def take(
    w: Any, ids: Any, *, mode: Literal["fill", "clip"] = "fill", dtype: Any = jnp.float32
) -> jax.Array:
    """Rows of a weight `[K, N]`, as `jnp.take(dequantize(w), ids, axis=0)`; only these are decoded.

    Args:
      w: a QTensor, a prepared weight, or an array.
      ids: integers of any shape; negative ones count from the end.
      mode: rows out of range are NaN (`"fill"`) or the nearest there is (`"clip"`).
      dtype: of the result; of an array its own.

    Returns:
      `[*ids.shape, N]`.

    Raises:
      ValueError: a stack of weights, or an unknown mode.
      TypeError: ids that are no integers, or a dtype of anything but floats.

    Examples:
      >>> q = fdq.quantize(jnp.ones((256, 64)), "W8A16")
      >>> fdq.take(q, jnp.array([[3, 1]])).shape
      (1, 2, 64)
    """
    if mode not in ("fill", "clip"):
        raise ValueError(f"take: mode={mode!r}; use 'fill' or 'clip'.")
    ids = as_indices(ids, "take: ids")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"take: dtype={jnp.dtype(dtype)}; expected a dtype of floats.")
    if w.ndim != 2:
        raise ValueError(
            f"take: expected a weight [K, N], found {tuple(w.shape)}; pick from leading axes first "
            "(q[i]), or map over them with jax.vmap."
        )
    if not isinstance(w, QuantizedWeight):
        table = as_weight(w, "take")
        pick = functools.partial(jnp.take, axis=0, mode=mode)
        with mesh_of(table, ids):
            return in_auto_axes(
                pick, table, ids, result=lambda: [*spec_entries(ids), spec_entry(table, -1)]
            )
    w, (k, n) = materialize(w), w.shape

    def rows(ids: jax.Array, w: QuantizedWeight) -> jax.Array:
        w, order = w.without_order()
        row = jnp.clip(jnp.where(ids < 0, ids + k, ids), 0, k - 1).reshape(-1)
        if order is not None:
            row = row_order.along(row_order.inverse(order), row)
        found = _rows(w, row).astype(dtype)
        found = found.reshape(*ids.shape, n)
        if mode == "fill":
            inside = ((ids >= -k) & (ids < k))[..., None]
            # A NumPy scalar: jax_debug_nans objects to an array that was made for this.
            found = jnp.where(inside, found, np.asarray(np.nan, found.dtype))
        return found

    def axes() -> list[Any]:
        return [*spec_entries(ids), spec_entry(jax.tree.leaves(w)[0], -1)]

    with mesh_of(w, ids):
        return in_auto_axes(rows, ids, w, result=axes)


def _rows(w: QuantizedWeight, row: jax.Array) -> jax.Array:
    """Rows `[R]` of a weight -> float32 `[R, N]`."""
    if isinstance(w, TransposedWeight):
        codes = jnp.take(w.data.codes, row, axis=1).T
        return codes.astype(jnp.float32) * w.data.scale.astype(jnp.float32)
    view = _view(w)
    if view is None:
        return jnp.take(dequantize(w), row, axis=0)
    codes = view.codes.reshape(view.units, view.unit_bytes, view.columns)
    codes = jnp.take(codes, row // view.unit_rows, axis=0)
    values = view.decode_unit([codes[:, i] for i in range(view.unit_bytes)])
    place = jnp.broadcast_to((row % view.unit_rows)[:, None], values[0].shape)
    found = values[0] if len(values) == 1 else lax.select_n(place, *values)
    groups = view.scale.shape[-2]
    group = jnp.zeros_like(row) if groups == 1 else row // (view.rows // groups)
    if view.zero is not None:
        found = found - jnp.take(view.zero, group, axis=0)
    factor = jnp.float32(view.format.unit_factor)
    found = found * (jnp.take(view.scale, group, axis=0) * factor)
    if view.offset is not None:
        found = found + jnp.take(view.offset, group, axis=0)
    return found[:, : w.shape[-1]]


def transposed_product(x: jax.Array, w: QuantizedWeight, *, out_dtype: Any = None) -> jax.Array:
    """`x [..., N] @ dequantize(w).T [..., K]`, decoded a tile of rows at a time, summed in float32.

    Rows of float64 are summed in float64. `out_dtype` is that of x, as it
    counts in `matmul`, by default.
    """
    x, w, k = as_rows(x, "fdq.einsum"), materialize(w), w.shape[-2]
    out_dtype = as_dtype(out_dtype, x.dtype, "fdq.einsum")

    def product(x: jax.Array, w: QuantizedWeight) -> jax.Array:
        w, order = w.without_order()
        rows = x.reshape(-1, x.shape[-1]).astype(wide_dtype(x))
        view = None if isinstance(w, TransposedWeight) else _view(w)
        if view is None or view.columns != rows.shape[-1]:
            y = exact_dot(rows, dequantize(w).astype(rows.dtype), axis=1)
        else:
            y = _by_tiles(rows, view)[:, :k]
        if order is not None:
            y = row_order.along(y, row_order.inverse(order))
        return y.reshape(*x.shape[:-1], k).astype(out_dtype)

    def axes() -> list[Any]:
        return [*spec_entries(x)[:-1], spec_entry(jax.tree.leaves(w)[0], -2)]

    with mesh_of(w, x):
        return in_auto_axes(product, x, w, result=axes)


def _by_tiles(x: jax.Array, view: WeightView) -> jax.Array:
    """`[M, N]` times the transpose of a weight -> `[M, view.rows]`."""
    groups, m = view.scale.shape[-2], x.shape[0]
    # A tile is some whole groups, or units of the only one.
    pieces = view.units if groups == 1 else groups
    size = view.rows // pieces
    wanted = max(1, min(pieces, TILE_WEIGHTS // (size * view.columns)))
    count = -(-pieces // wanted)

    @jax.checkpoint
    def tile(start: jax.Array) -> jax.Array:
        def cut(a: jax.Array, rows: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, start * rows, wanted * rows, axis=0)

        part = dataclasses.replace(view, codes=cut(view.codes, view.codes.shape[0] // pieces))
        if groups > 1:
            scale, zero, offset = (
                None if a is None else cut(a, 1) for a in (view.scale, view.zero, view.offset)
            )
            part = dataclasses.replace(part, scale=scale, zero=zero, offset=offset)
        planes = [exact_dot(x, plane.astype(x.dtype), axis=1) for plane in decode_planes(part)]
        return jnp.stack(planes, axis=-1).reshape(m, wanted * size)

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        # The last tile starts earlier where it would be shorter, and does some rows again.
        start = jnp.minimum(jnp.asarray(i, jnp.int32) * wanted, pieces - wanted)
        return lax.dynamic_update_slice_in_dim(y, tile(start), start * size, axis=1)

    return lax.fori_loop(0, count, body, jnp.zeros((m, view.rows), x.dtype))


def _view(w: QuantizedWeight) -> WeightView | None:
    """How packed units are read where they lie, a checkpoint's or a kernel's."""
    if isinstance(w, WordsWeight):
        return view_words(w.data)
    return view_weight(differentiable(w.canonical()))
