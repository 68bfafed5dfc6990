"""``matmul``: ``x @ w`` for a weight that is an array or a QTensor, in any scheme's arithmetic."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QTensor, canonical, dequantize, materialize
from fdq.ops import mosaic_gpu
from fdq.ops.activation import activation_values, integer_product, quantize_activation
from fdq.ops.choice import (
    Target,
    choose_formulation,
    resolve_implementation,
    trace_target,
)
from fdq.ops.explicit_axes import in_auto_axes, spec_entry
from fdq.ops.layouts import transposed_integer_product, transposed_split_product
from fdq.ops.weight_only import exact_dot, fused_product, plane_product, tiled
from fdq.ops.weight_view import view_array, view_weight
from fdq.schemes.scheme import ActivationSpec


def parse_activation(activation: ActivationSpec | str | None) -> ActivationSpec | None:
    """An ActivationSpec from itself, from its name (``"int8"``, ``"fp8-x128"``), or None."""
    return ActivationSpec.parse(activation) if isinstance(activation, str) else activation


def matmul(
    x: jax.Array,
    w: QTensor | jax.Array,
    *,
    activation: ActivationSpec | str | None = None,
    activation_scale: jax.Array | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    path: str = "<array>",
) -> jax.Array:
    """``x @ w`` without decoding the whole weight to memory.

    Without ``activation`` it is ``x @ dequantize(w)``. On CPU weights are decoded to float32 and
    products summed in float32 whatever the dtype of x. On GPUs and TPUs a few rows of x are
    treated the same way; for more rows the dot takes the dtype of x (float16 on GPUs without
    bfloat16), rounds decoded weights to it (scales per channel are applied to the float32 sum
    instead) and sums in float32.

    With ``activation`` the rows of x are quantized and the product is formed in that arithmetic:

    - int8 activations and integer weights: int32 sums of ``code * (code - zero)`` over each group
      (over all of K for scales per channel), times the scales in float32. One row on CPU (a few
      rows of weights of 4 bits and fewer) is summed in float32, with the scales multiplied in along
      the way: the products are exact there, and so are their sums up to 2^24.
    - float8 activations, or int8 with weights that are not integers: products of the code values
      are exact in float32 and summed in float32; scales per token and 128 channels are multiplied
      in per slice of K.

    The gradient with respect to x is that of ``x @ dequantize(w)``: straight through the rounding
    of activations. Quantized weights get no gradient.

    Args:
      x: ``[..., K]``, any float dtype.
      w: ``[K, N]``: an array or a QTensor in any layout (map over leading axes with ``jax.vmap``).
      activation: an ActivationSpec or its name (``"int8"``, ``"fp8"``, ``"fp8-x128"``); None leaves
        x alone.
      activation_scale: calibrated scale (one number) of a static ActivationSpec.
      implementation: ``"xla"``, ``"mosaic_gpu"`` or None for the best; ``FDQ_IMPLEMENTATION`` in
        the environment is read while tracing where it is None.
      out_dtype: dtype of the result; that of x by default.
      path: name of the layer, used only in errors.

    Returns:
      ``[..., N]``.

    Raises:
      ValueError: shapes that do not match, an unknown name, a missing or superfluous scale.
      NotImplementedError: an implementation that this version does not have.

    Examples:
      >>> q = fdq.quantize(jnp.ones((256, 64)), "W4A16")
      >>> fdq.matmul(jnp.ones((3, 256)), q).shape
      (3, 64)
    """
    request = resolve_implementation("matmul", implementation)
    spec = parse_activation(activation)
    shape = tuple(w.shape)
    if len(shape) != 2 or x.ndim == 0 or x.shape[-1] != shape[0]:
        hint = "; map over leading axes with jax.vmap" if len(shape) > 2 else ""
        raise ValueError(
            f"{path}: matmul expects x [..., K] and w [K, N], found x {tuple(x.shape)} and "
            f"w {shape}{hint}."
        )
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if activation_scale is not None:
        activation_scale = jnp.asarray(activation_scale)
    if isinstance(w, QTensor):
        w = materialize(w)
    kernel = mosaic_gpu.use_matrix_vector("matmul", request, math.prod(x.shape[:-1]), w, spec)

    def product(x, w, activation_scale):
        rows = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if isinstance(w, QTensor):
            y = _quantized_rows(rows, w, activation_scale, spec, path, kernel)
        else:
            y = _dense_rows(rows, w, activation_scale, spec, path)
        y = y.astype(out_dtype)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], shape[1])

    def result():
        codes = jax.tree.leaves(w)[0]
        axis = -2 if isinstance(w, QTensor) and w.layout == "transposed" else -1
        return [spec_entry(x, i) for i in range(x.ndim - 1)] + [spec_entry(codes, axis)]

    return in_auto_axes(product, x, w, activation_scale, result=result)


def _dense_rows(rows, w, activation_scale, spec, path):
    if spec is not None:
        codes, scale = quantize_activation(rows, spec, activation_scale, path=path)
        quantized = activation_values(codes, scale, spec.group_size, rows.dtype)
        # Straight through: the value of the quantized x, the gradient of x.
        rows = rows + lax.stop_gradient(quantized - rows)
    return dense_product(rows, w)


def dense_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x [M, K] @ w [K, N]`` for float arrays -> float32.

    Both operands take the wider dtype of the two. XLA's CPU backend converts a 16-bit weight to
    float32 as a whole for one row of x, and for two rows and more does not: one row is a fusion
    like that of quantized weights, which is faster still.
    """
    dtype = jnp.promote_types(x.dtype, w.dtype)
    if x.shape[0] == 1 and dtype.itemsize == 2 and trace_target().platform == "cpu":
        return _sixteen_bit_row(x.astype(dtype), w.astype(dtype))
    return exact_dot(x.astype(dtype), w.astype(dtype))


@jax.custom_vjp
def _sixteen_bit_row(x: jax.Array, w: jax.Array) -> jax.Array:
    x, w = lax.optimization_barrier((x, w))  # as in quantized_product
    choice = choose_formulation("array", 1, w.size)
    size = choice.size if choice.name == "fused" else 8
    return fused_product(x.astype(jnp.float32), view_array(w), size, dot=True)


def _sixteen_bit_row_backward(residuals, g):
    x, w = residuals
    dx = _dot_over_columns(g, w.astype(jnp.float32)).astype(x.dtype)
    return dx, (x.astype(jnp.float32).T * g).astype(w.dtype)


_sixteen_bit_row.defvjp(lambda x, w: (_sixteen_bit_row(x, w), (x, w)), _sixteen_bit_row_backward)


def transposed_matmul(x: jax.Array, w: jax.Array, *, out_dtype: Any = None) -> jax.Array:
    """``x @ w.T`` for an array ``w [N, K]`` (a tied embedding), without forming ``w.T``.

    Args:
      x: ``[..., K]``, any float dtype.
      w: ``[N, K]``, any float dtype.
      out_dtype: of the result; that of x by default.

    Returns:
      ``[..., N]``, summed in float32. One row of 16-bit floats is padded to two on CPU, where XLA
      would otherwise convert the whole weight to float32 first.
    """
    dtype = jnp.promote_types(x.dtype, w.dtype)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)

    def product(x, w):
        rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        m = rows.shape[0]
        if m == 1 and dtype.itemsize == 2 and trace_target().platform == "cpu":
            rows = jnp.concatenate([rows, jnp.zeros_like(rows)], axis=0)
        y = _dot_over_columns(rows, w.astype(dtype))[:m].astype(out_dtype)
        return y.reshape(*x.shape[:-1], w.shape[0])

    def result():
        return [spec_entry(x, i) for i in range(x.ndim - 1)] + [spec_entry(w, 0)]

    return in_auto_axes(product, x, w, result=result)


def _dot_over_columns(x: jax.Array, w: jax.Array) -> jax.Array:
    """``[M, K]`` times ``[N, K]`` -> float32 ``[M, N]``."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _quantized_rows(
    x: jax.Array,
    q: QTensor,
    activation_scale: jax.Array | None,
    spec: ActivationSpec | None,
    path: str,
    kernel: bool,
) -> jax.Array:
    """``[M, K] -> [M, N]`` float32, with the gradient of ``x @ dequantize(q)``."""
    return quantized_product(x, q, spec, activation_scale, path=path, kernel=kernel)


def _forward(x, q, activation_scale, spec, path, kernel):
    y = quantized_product(x, q, spec, activation_scale, path=path, kernel=kernel)
    return y, (q, jnp.zeros((0,), x.dtype), activation_scale)


def _backward(spec, path, kernel, residuals, g):
    del spec, path, kernel
    q, like, activation_scale = residuals
    w = dequantize(q)
    dx = _dot_over_columns(g, w)
    scale_gradient = None if activation_scale is None else jnp.zeros_like(activation_scale)
    return dx.astype(like.dtype), None, scale_gradient


_quantized_rows.defvjp(_forward, _backward)


def quantized_product(
    x: jax.Array,
    q: QTensor,
    spec: ActivationSpec | None,
    activation_scale: jax.Array | None = None,
    *,
    path: str = "<array>",
    kernel: bool = False,
) -> jax.Array:
    """``[M, K]`` times a QTensor ``[K, N]`` -> float32 ``[M, N]``; the formulation is chosen here.

    Not differentiable by itself where a loop is chosen; ``matmul`` and ``grouped_matmul`` are.
    With ``kernel`` it is a Mosaic GPU kernel, whatever the device.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, q.shape[-1]), jnp.float32)
    if kernel:
        return _kernel_product(x, q, spec, activation_scale, path)
    target = trace_target()
    # Ties the weight to x. In a decode loop XLA would otherwise move the decoding, which does not
    # depend on the token, out of the loop, and every step would read float32 weights from memory.
    x, q = lax.optimization_barrier((x, q))
    if spec is None:
        return _product(x, q, target)
    codes, scale = quantize_activation(x, spec, activation_scale, path=path)
    if spec.granularity == "token_group":
        # Exact products of codes, each slice of K scaled by its activation scale.
        return _product(activation_values(codes, scale, spec.group_size, jnp.float32), q, target)
    if mosaic_gpu.takes_integers(q, spec):
        y = _integer_rows(codes, q, target)
    else:
        y = _product(codes.astype(jnp.float32), q, target)
    return y * scale


def _kernel_product(x, q, spec, activation_scale, path) -> jax.Array:
    """`quantized_product` by the kernels: the same arithmetic."""
    if spec is None:
        return mosaic_gpu.product(x, q)
    codes, scale = quantize_activation(x, spec, activation_scale, path=path)
    if spec.granularity == "token_group":
        rows = activation_values(codes, scale, spec.group_size, jnp.float32)
        return mosaic_gpu.product(rows, q)
    if mosaic_gpu.takes_integers(q, spec):
        return mosaic_gpu.integer_product(codes, q) * scale
    return mosaic_gpu.product(codes.astype(jnp.float32), q) * scale


def _integer_rows(codes: jax.Array, q: QTensor, target: Target) -> jax.Array:
    """int8 rows times integer weights, before the activation scale."""
    if q.layout == "transposed":
        return transposed_integer_product(codes, q)
    view = view_weight(canonical(q))
    if view is None:
        return _product(codes.astype(jnp.float32), q, target)
    m, elements = codes.shape[0], view.rows * view.columns
    if target.platform != "cpu":
        return integer_product(codes, view)
    choice = choose_formulation(f"{view.kind} x int8", m, elements)
    if choice.name == "fused":
        return fused_product(codes.astype(jnp.float32), view, choice.size, dot=True)
    if choice.name == "tiles":
        return tiled(integer_product, codes, view, choice.size)
    return integer_product(codes, view)


# Beyond this many rows a fusion per row reads the codes too often.
_FUSED_ROWS = 4
# On GPUs the reduction is part of the fusion and is spread over threads by XLA: nothing to unroll.
_REDUCED_UNITS = 1


def _product(x: jax.Array, q: QTensor, target: Target) -> jax.Array:
    """Float rows times a QTensor, by the formulation that suits the device."""
    if q.layout == "transposed":
        return transposed_split_product(x, q)
    q = canonical(q)
    view = view_weight(q)
    if view is None:
        return exact_dot(x.astype(jnp.float32), dequantize(q))
    m, elements = x.shape[0], view.rows * view.columns
    if target.platform != "cpu":
        if m <= _FUSED_ROWS:
            return fused_product(x.astype(jnp.float32), view, _REDUCED_UNITS, dot=False)
        return plane_product(x, view, _compute_dtype(x.dtype, target))
    x = x.astype(jnp.float32)
    choice = choose_formulation(view.kind, m, elements)
    if choice.name == "fused":
        return fused_product(x, view, choice.size, dot=True)
    if choice.name == "tiles":
        return tiled(plane_product, x, view, choice.size)
    return plane_product(x, view)


def _compute_dtype(dtype: Any, target: Target) -> Any:
    """What a dot computes in: the dtype of x, but float16 where bfloat16 is emulated."""
    if dtype == jnp.bfloat16 and not target.has_bfloat16:
        return jnp.float16
    return dtype
