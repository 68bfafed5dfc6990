"""`matmul`: `x @ w` for a weight that is an array or quantized, in any scheme's arithmetic."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.ops.implementation import Implementation, Op
from fdq.ops.matmul.mosaic_gpu import MosaicGpu
from fdq.ops.matmul.product import Product, parse_activation
from fdq.ops.matmul.weight_only import exact_dot
from fdq.ops.matmul.xla import Xla
from fdq.ops.placement import in_auto_axes, spec_entries, spec_entry
from fdq.ops.prepared_weight import TransposedWeight
from fdq.ops.rows import Gated, Normed, Rows, Sums, as_array
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.typing import Array, Float

MATMUL: Op[Product] = Op("matmul", MosaicGpu(), Xla())
"""Implementations return the parts of the product, float32 `[split, ..., N]`."""


def matmul(
    x: Float[Array, "*m k"],
    w: QuantizedWeight | Float[Array, "k n"],
    *,
    activation: ActivationSpec | str | None = None,
    activation_scale: jax.Array | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    path: str = "<array>",
) -> Float[Array, "*m n"]:
    """`x @ w` without decoding the whole weight to memory.

    Without `activation` it is `x @ dequantize(w)`. On CPU weights are decoded to float32 and
    products summed in float32 whatever the dtype of x. On GPUs and TPUs a few rows of x are
    treated the same way; for more rows the dot takes the dtype of x (float16 on GPUs without
    bfloat16), rounds decoded weights to it (scales per channel are applied to the float32 sum
    instead) and sums in float32.

    With `activation` the rows of x are quantized and the product is formed in that arithmetic:

    - int8 activations and integer weights: int32 sums of `code * (code - zero)` over each group
      (over all of K for scales per channel), times the scales in float32. One row on CPU (a few
      rows of weights of 4 bits and fewer) is summed in float32, with the scales multiplied in along
      the way: the products are exact there, and so are their sums up to 2^24.
    - float8 activations, or int8 with weights that are not integers: products of the code values
      are exact in float32 and summed in float32; scales per token and 128 channels are multiplied
      in per slice of K.

    The gradient with respect to x is that of `x @ dequantize(w)`: straight through the rounding
    of activations. Quantized weights get no gradient.

    Args:
      x: `[..., K]`, floats of 16 bits and more; integers, truth values and 8-bit floats count as
        float32.
      w: `[K, N]`: an array, a QTensor or a prepared weight (map over leading axes with `jax.vmap`).
      activation: an ActivationSpec or its name (`"int8"`, `"fp8"`, `"fp8-x128"`); None leaves x
        alone.
      activation_scale: calibrated scale (one number) of a static ActivationSpec.
      implementation: `"xla"`, `"mosaic_gpu"` or None for the best; FDQ_IMPLEMENTATION in the
        environment is read while tracing where it is None.
      out_dtype: dtype of the result; that of x, as it counts, by default.
      path: name of the layer, used only in errors.

    Returns:
      `[..., N]`.

    Raises:
      ValueError: shapes that do not match, an unknown name, a missing or superfluous scale.
      TypeError: x is complex, or the array w not of floats.
      NotImplementedError: the implementation that was asked for cannot compute this.

    Examples:
      >>> q = fdq.quantize(jnp.ones((256, 64)), "W4A16")
      >>> fdq.matmul(jnp.ones((3, 256)), q).shape
      (3, 64)
    """
    spec = parse_activation(activation)
    arguments = Product(x, w, spec, activation_scale, dtype=out_dtype, path=path)
    return product(arguments, implementation).value()


def product(arguments: Product, implementation: str | None = None) -> Sums:
    """The product with its sum left to whoever reads it; see `matmul`."""
    run, a = MATMUL.choose(arguments, implementation), arguments
    call = functools.partial(_of_quantized if a.quantized else _parts, run, a.activation, a.path)

    def axes() -> list[Any]:
        columns = -2 if isinstance(a.w, TransposedWeight) else -1
        return [None, *row_axes(a.x), spec_entry(jax.tree.leaves(a.w)[0], columns)]

    return Sums(in_auto_axes(call, a.x, a.w, a.activation_scale, result=axes), a.bias, a.dtype)


def _parts(run, activation, path, x, w, activation_scale) -> jax.Array:
    return run(Product(x, w, activation, activation_scale, path=path))


# The gradient of every implementation, where the weight is quantized; that of arrays is JAX's own.
_of_quantized = jax.custom_vjp(_parts, nondiff_argnums=(0, 1, 2))


def _forward(run: Implementation[Product], activation, path, x, w, activation_scale):
    parts = _parts(run, activation, path, x, w, activation_scale)
    return parts, (kept_rows(x), w, activation_scale)


def _backward(run, activation, path, residuals, cotangent):
    rows, w, scale = residuals
    dx = product_cotangent(rows, w, cotangent)
    return dx, None, None if scale is None else jnp.zeros_like(scale)


_of_quantized.defvjp(_forward, _backward)


def product_cotangent(kept: Rows, w: Any, cotangent: jax.Array) -> Rows:
    """The cotangent of the rows of a product with a quantized weight from that of its parts."""
    # A sum's parts have one reader, which adds them up: their cotangents are equal.
    g = cotangent[0]
    dx = exact_dot(g.reshape(-1, g.shape[-1]), dequantize(w), axis=1)
    return rows_cotangent(kept, dx.reshape(*g.shape[:-1], dx.shape[-1]))


def kept_rows(x: Rows) -> Rows:
    """What a gradient needs to know of its rows: all of unfinished ones, of arrays the dtype."""
    return x if isinstance(x, Normed | Sums | Gated) else jnp.zeros((0,), x.dtype)


def rows_cotangent(kept: Rows, dx: jax.Array) -> Rows:
    """The cotangent of rows from that of their float32 values."""
    if not isinstance(kept, Normed | Sums | Gated):
        return dx.astype(kept.dtype)
    return jax.vjp(as_array, kept)[1](dx.astype(kept.dtype))[0]


def row_axes(x: Rows) -> list[Any]:
    """Mesh axes of the leading axes of rows."""
    if isinstance(x, Gated):
        x = x.sums
    axes = spec_entries(x.x if isinstance(x, Normed) else x.parts if isinstance(x, Sums) else x)
    axes = axes[1:-1] if isinstance(x, Sums) else axes[:-1]
    if len(x.shape) == 2 and len(axes) > 1:  # flattened where they are read
        names = [(a,) if isinstance(a, str) else a or () for a in axes]
        return [sum(names, ()) or None]
    return axes
