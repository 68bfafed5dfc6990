"""`grouped_matmul`: every row of x times the weight of the expert that was picked for it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.ops.grouped_matmul.mosaic_gpu import MosaicGpu
from fdq.ops.grouped_matmul.product import GroupedProduct
from fdq.ops.grouped_matmul.xla import Xla, for_each_expert, pick_expert
from fdq.ops.implementation import Op
from fdq.ops.matmul import api as matmul
from fdq.ops.matmul.product import Product, parse_activation
from fdq.ops.matmul.weight_only import exact_dot
from fdq.ops.placement import in_auto_axes, spec_entry
from fdq.ops.rows import Sums, as_array
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.typing import Array, Float, Int

GROUPED_MATMUL: Op[GroupedProduct] = Op("grouped_matmul", MosaicGpu(), Xla())


def grouped_matmul(
    x: Float[Array, "t k"],
    w: QuantizedWeight | Float[Array, "e k n"],
    expert_index: Int[Array, " t"] | Int[Array, "t picks"],
    *,
    activation: ActivationSpec | str | None = None,
    activation_scale: jax.Array | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    path: str = "<array>",
) -> Float[Array, "t n"] | Float[Array, "t picks n"]:
    """`y[t] = x[t] @ w[expert_index[t]]`.

    Up to one row an expert (decode), each row reads the codes of its own expert and decodes them
    on the way, as `matmul` does for one row. With more rows (prefill) they are sorted by expert
    and taken in tiles of one expert each, so that an expert is decoded once a tile, experts
    without rows never, and no row is dropped.

    Args:
      x: `[T, K]`.
      w: `[E, K, N]`, an array, a QTensor or a prepared weight.
      expert_index: int `[T]`, or `[T, picks]` for several experts a row; each in `0 .. E - 1`.
      activation: as in `matmul`.
      activation_scale: one scale for all experts, or `[E]`.
      implementation: as in `matmul`.
      out_dtype: as in `matmul`.
      path: as in `matmul`.

    Returns:
      `[T, N]`, or `[T, picks, N]`. The gradient with respect to x is that of the decoded weights.
    """
    settings = {"dtype": out_dtype, "path": path}
    spec = parse_activation(activation)
    arguments = GroupedProduct(x, w, spec, activation_scale, index=expert_index, **settings)
    return grouped_product(arguments, implementation=implementation)[0].value()


def grouped_product(
    arguments: GroupedProduct, weights: jax.Array | None = None, implementation: str | None = None
) -> tuple[Sums, Sums | None]:
    """The product, and the one beside it, their sums left to whoever reads them.

    With `weights`, float32 `[T, picks]`, the picks of a row are added up: `[T, N]`.
    """
    a, beside = arguments, arguments.beside
    run: Any = GROUPED_MATMUL.choose(a, implementation)
    joined = beside is not None and run.joins(a)
    other = (beside.x, beside.w) if beside is not None and joined else None
    call = functools.partial(_parts, run, a.activation, a.picks, a.path)
    arrays = (a.x, a.w, a.index, a.activation_scale, other)
    found = in_auto_axes(call, *arrays, result=lambda: _axes(a))
    parts, more = found if joined else (found, None)
    sums = Sums(parts, dtype=a.dtype)
    if weights is not None:
        sums = Sums.of(run.combine(sums, weights))
    if beside is None:
        return sums, None
    return sums, Sums(more, beside.bias, beside.dtype) if joined else matmul.product(beside)


def _axes(a: GroupedProduct) -> list[Any]:
    rows, columns = matmul.row_axes(a.x), spec_entry(jax.tree.leaves(a.w)[0], -1)
    return [None, *rows, *[None] * (a.index.ndim - len(rows)), columns]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _parts(run, activation, picks, path, x, w, index, activation_scale, beside):
    other = None if beside is None else Product(*beside)
    settings = {"index": index, "beside": other, "path": path}
    return run(GroupedProduct(x, w, activation, activation_scale, **settings))


def _forward(run, activation, picks, path, x, w, index, activation_scale, beside):
    y = _parts(run, activation, picks, path, x, w, index, activation_scale, beside)
    # The rows are needed for the gradient of an array weight only.
    kept = matmul.kept_rows(x) if isinstance(w, QuantizedWeight) else x
    other = None if beside is None else (matmul.kept_rows(beside[0]), beside[1])
    return y, (kept, w, index, activation_scale, other)


def _backward(run, activation, picks, path, residuals, cotangents):
    kept, w, index, activation_scale, beside = residuals
    # A sum's parts have one reader, which adds them up: their cotangents are equal.
    g = (cotangents if beside is None else cotangents[0])[0]
    g, picked = g.reshape(index.size, g.shape[-1]), index.reshape(-1)
    experts, k = w.shape[0], w.shape[1]

    def transposed(rows, expert):
        one = pick_expert(w, expert)
        decoded = dequantize(one) if isinstance(one, QuantizedWeight) else one.astype(jnp.float32)
        return exact_dot(rows, decoded, axis=1)

    dx = for_each_expert(transposed, g, picked, experts, k).reshape(*index.shape, k)
    dx = dx.sum(axis=-2) if picks > 1 else dx
    dw = None
    if not isinstance(w, QuantizedWeight):
        x = jnp.repeat(as_array(kept).reshape(-1, k), picks, axis=0)

        def weight_gradient(expert):
            mine = (picked == expert)[:, None]
            rows = jnp.where(mine, x, jnp.zeros_like(x)).astype(jnp.float32)
            return exact_dot(rows.T, g).astype(w.dtype)

        dw = lax.map(weight_gradient, jnp.arange(experts, dtype=jnp.int32))
    other = None
    if beside is not None:
        other = matmul.product_cotangent(beside[0], beside[1], cotangents[1]), None
    scale_gradient = None if activation_scale is None else jnp.zeros_like(activation_scale)
    return matmul.rows_cotangent(kept, dx), dw, None, scale_gradient, other


_parts.defvjp(_forward, _backward)
