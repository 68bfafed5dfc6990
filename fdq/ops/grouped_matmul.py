"""``grouped_matmul``: every row of x times the weight of the expert that was picked for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QTensor, dequantize, materialize
from fdq.ops import mosaic_gpu
from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.choice import resolve_implementation
from fdq.ops.explicit_axes import in_auto_axes, spec_entry
from fdq.ops.matmul import dense_product, parse_activation, quantized_product
from fdq.schemes.scheme import ActivationSpec

_SMALLEST_TILE, _LARGEST_TILE = 16, 256


def grouped_matmul(
    x: jax.Array,
    w: QTensor | jax.Array,
    expert_index: jax.Array,
    *,
    activation: ActivationSpec | str | None = None,
    activation_scale: jax.Array | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    path: str = "<array>",
) -> jax.Array:
    """``y[t] = x[t] @ w[expert_index[t]]``.

    Up to one row an expert (decode), each row reads the codes of its own expert and decodes them
    on the way, as ``matmul`` does for one row. With more rows (prefill) they are sorted by expert
    and taken in tiles of one expert each, so that an expert is decoded once a tile, experts
    without rows never, and no row is dropped.

    Args:
      x: ``[T, K]``.
      w: ``[E, K, N]``, an array or a QTensor.
      expert_index: int ``[T]``, each in ``0 .. E - 1``.
      activation: as in ``matmul``.
      activation_scale: one scale for all experts, or ``[E]``.
      implementation: as in ``matmul``.
      out_dtype: of the result; that of x by default.
      path: name of the layer, used only in errors.

    Returns:
      ``[T, N]``. The gradient with respect to x is that of the decoded weights.
    """
    request = resolve_implementation("grouped_matmul", implementation)
    spec = parse_activation(activation)
    shape = tuple(w.shape)
    if len(shape) != 3 or x.ndim != 2 or x.shape[1] != shape[1]:
        raise ValueError(
            f"{path}: grouped_matmul expects x [T, K] and w [E, K, N], found x {tuple(x.shape)} "
            f"and w {shape}."
        )
    if expert_index.shape != x.shape[:1]:
        raise ValueError(
            f"{path}: expected one expert a row, [{x.shape[0]}], found {expert_index.shape}."
        )
    if isinstance(w, QTensor):
        w = materialize(w)
    kernel = mosaic_gpu.use_gathered(request, x.shape[0], w, spec)
    if activation_scale is not None:
        activation_scale = jnp.asarray(activation_scale)
    index = expert_index.astype(jnp.int32)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)

    def product(x, w, index, activation_scale):
        if kernel:
            sums = mosaic_gpu.gathered_sums(x, w, index, None)
            return jnp.sum(sums, axis=0).astype(out_dtype)
        return _grouped_rows(x, w, index, activation_scale, spec, path).astype(out_dtype)

    def result():
        codes = jax.tree.leaves(w)[0]
        return [spec_entry(x, 0), spec_entry(codes, -1)]

    return in_auto_axes(product, x, w, index, activation_scale, result=result)


def pick_expert(w: QTensor | jax.Array, index: jax.Array) -> Any:
    """Expert ``index`` of a stack; a dynamic slice of its codes, which fuses into the decoding."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), w)


def _expert_product(w, spec, activation_scale, path) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``(rows [M, K], expert) -> [M, N]`` float32."""

    def product(rows, expert):
        scale = activation_scale
        if scale is not None and scale.size != 1:
            scale = scale.reshape(-1)[expert]
        one = pick_expert(w, expert)
        if isinstance(one, QTensor):
            return quantized_product(rows, one, spec, scale, path=path)
        if spec is not None:
            codes, scale = quantize_activation(rows, spec, scale, path=path)
            rows = activation_values(codes, scale, spec.group_size, rows.dtype)
        return dense_product(rows, one)

    return product


def for_each_expert(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    index: jax.Array,
    experts: int,
    n: int,
) -> jax.Array:
    """``y[t] = product(x[t:t + 1], index[t])``, a row or a tile of one expert's rows at a time.

    Args:
      product: ``(rows [M, K], expert) -> [M, N]`` float32, independent row by row.
      x: ``[T, K]``.
      index: int32 ``[T]``.
      experts: E.
      n: N.
    """
    t = x.shape[0]
    if t == 1:
        return product(x, index[0])
    if t <= max(experts, 2):

        def step(_, item):
            row, expert = item
            return None, product(row[None], expert)[0]

        return lax.scan(step, None, (x, index))[1]
    tile = _SMALLEST_TILE
    while tile < _LARGEST_TILE and tile * experts < t:
        tile *= 2
    order = jnp.argsort(index, stable=True)
    counts = jnp.zeros((experts,), jnp.int32).at[index].add(1)
    first_row = jnp.cumsum(counts) - counts
    tiles = -(-counts // tile)
    last_tile = jnp.cumsum(tiles)
    # Rows beyond the last are written by its tile and cut off.
    rows = jnp.pad(x[order], [(0, tile), (0, 0)])

    def body(i, y):
        expert = jnp.searchsorted(last_tile, i, side="right").astype(jnp.int32)
        start = first_row[expert] + (i - last_tile[expert] + tiles[expert]) * tile
        # Rows of the next experts in this tile are wrong, and overwritten by tiles to come.
        block = product(lax.dynamic_slice_in_dim(rows, start, tile, axis=0), expert)
        return lax.dynamic_update_slice_in_dim(y, block, start, axis=0)

    y = jnp.zeros((t + tile, n), jnp.float32)
    y = lax.fori_loop(0, last_tile[-1], body, y)
    return jnp.zeros((t, n), jnp.float32).at[order].set(y[:t], unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_rows(x, w, index, activation_scale, spec, path):
    product = _expert_product(w, spec, activation_scale, path)
    return for_each_expert(product, x, index, w.shape[0], w.shape[2])


def _forward(x, w, index, activation_scale, spec, path):
    y = _grouped_rows(x, w, index, activation_scale, spec, path)
    # x is kept for the gradient of an array weight only.
    kept = x if not isinstance(w, QTensor) else jnp.zeros((0,), x.dtype)
    return y, (kept, w, index, activation_scale)


def _backward(spec, path, residuals, g):
    del spec, path
    x, w, index, activation_scale = residuals
    experts, k = w.shape[0], w.shape[1]

    def transposed(rows, expert):
        one = pick_expert(w, expert)
        decoded = dequantize(one) if isinstance(one, QTensor) else one.astype(jnp.float32)
        return lax.dot_general(
            rows, decoded, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )

    dx = for_each_expert(transposed, g, index, experts, k).astype(x.dtype)
    dw = None
    if not isinstance(w, QTensor):

        def weight_gradient(expert):
            mine = (index == expert)[:, None]
            rows = jnp.where(mine, x, jnp.zeros_like(x)).astype(jnp.float32)
            return lax.dot(rows.T, g, precision=lax.Precision.HIGHEST).astype(w.dtype)

        dw = lax.map(weight_gradient, jnp.arange(experts, dtype=jnp.int32))
    scale_gradient = None if activation_scale is None else jnp.zeros_like(activation_scale)
    return dx, dw, None, scale_gradient


_grouped_rows.defvjp(_forward, _backward)
