"""`matmul`: `x @ w` for a weight that is an array or quantized, in any scheme's arithmetic."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import row_order
from fdq.formats.qtensor import QuantizedWeight
from fdq.ops.implementation import Op
from fdq.ops.interleaved_weight import InterleavedWeight
from fdq.ops.matmul import derivative
from fdq.ops.matmul.decoded import Decoded
from fdq.ops.matmul.mosaic_gpu import MosaicGpu
from fdq.ops.matmul.product import Product, parse_activation
from fdq.ops.matmul.wide_rows import in_float32
from fdq.ops.matmul.xla import Xla
from fdq.ops.placement import in_auto_axes, mesh_of, spec_entries, spec_entry
from fdq.ops.prepared_weight import TransposedWeight
from fdq.ops.rows import Gated, Normed, Rows, Sums, as_array
from fdq.ops.transposing import is_traced, transposable
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.typing import Array, Float, Shaped

MATMUL: Op[Product] = Op("matmul", MosaicGpu(), Decoded(), Xla())
"""Implementations return the parts of the product, `[split, ..., N]`: float32, or one part of the
wanted dtype."""


def matmul(
    x: Shaped[Array, "*m k"],
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
    products summed in float32 whatever the dtype of x. On GPUs and TPUs a few rows of x (up to 8;
    up to 64 of 16 bits where tensor cores have a kernel, which multiplies codes and sums in
    float32) are treated the same way; for more rows the dot takes the dtype of x (float16 on GPUs
    without bfloat16), rounds decoded weights to it (scales per channel are applied to the float32
    sum instead) and sums in float32.

    With `activation` the rows of x are quantized and the product is formed in that arithmetic:

    - int8 activations and integer weights: int32 sums of `code * (code - zero)` over each group
      (over all of K for scales per channel), times the scales in float32. One row on CPU (a few
      rows of weights of 4 bits and fewer) is summed in float32, with the scales multiplied in along
      the way: the products are exact there, and so are their sums up to 2^24.
    - float8 activations, or int8 with weights that are not integers: products of the code values
      are exact in float32 and summed in float32; scales per token and 128 channels are multiplied
      in per slice of K.
    - more than 64 rows on GPUs: int8 by int8 and float8 by float8 with scales per channel are
      multiplied as codes. Everything else is multiplied with weights, and with values that have
      scales per token and group, rounded to the dtype of x.

    Derivatives, forward and reverse, are those of `x @ dequantize(w)`: straight through the
    rounding of activations; of a QTensor with respect to its scales (its integer codes have none).
    `jax.linear_transpose` with respect to x too is that of `x @ dequantize(w)`.

    Args:
      x: `[..., K]`, floats of 16 bits and more; integers, truth values and 8-bit floats count as
        float32. float64 (under `jax_enable_x64`) keeps its range with a quantized weight, at the
        precision of float32.
      w: `[K, N]`: an array of floats (those of 8 bits count as float32), a QTensor or a prepared
        weight (map over leading axes with `jax.vmap`).
      activation: an ActivationSpec or its name (`"int8"`, `"fp8"`, `"fp8-x128"`); None leaves x
        alone.
      activation_scale: calibrated scale (one number) of a static ActivationSpec.
      implementation: `"xla"`, `"mosaic_gpu"`, `"decoded"` (many rows on GPUs) or None for the best;
        FDQ_IMPLEMENTATION in the environment is read while tracing where it is None.
      out_dtype: dtype of the result; that of x, as it counts, by default.
      path: name of the layer, used only in errors.

    Returns:
      `[..., N]`.

    Raises:
      ValueError: shapes that do not match, an unknown name, a missing or superfluous scale.
      TypeError: x is complex or no array, or w neither quantized nor an array of floats.
      NotImplementedError: the implementation that was asked for cannot compute this; a derivative
        with respect to `activation_scale`, or to a weight that `prepare` laid out.

    Examples:
      >>> q = fdq.quantize(jnp.ones((256, 64)), "W4A16")
      >>> fdq.matmul(jnp.ones((3, 256)), q).shape
      (3, 64)
    """
    spec = parse_activation(activation)
    arguments = Product(x, w, spec, activation_scale, dtype=out_dtype, path=path)
    return product(arguments, implementation).value()


QuantizedWeight._matmul = staticmethod(matmul)


def product(arguments: Product, implementation: str | None = None) -> Sums:
    """The product with its sum left to whoever reads it; see `matmul`."""
    order = None
    if isinstance(arguments.w, InterleavedWeight):
        order = arguments.w.order
        arguments = dataclasses.replace(arguments, w=arguments.w.inner)
    arguments = in_order_of_codes(arguments)
    run, a = MATMUL.choose(arguments, implementation), arguments
    call = functools.partial(
        _of_quantized if a.quantized else _parts, run, a.activation, a.dtype, a.path
    )

    def axes() -> list[Any]:
        columns = -2 if isinstance(a.w, TransposedWeight) else -1
        return [None, *row_axes(a.x), spec_entry(jax.tree.leaves(a.w)[0], columns)]

    with jax.named_scope("matmul"):
        parts = in_auto_axes(call, a.x, a.w, a.activation_scale, result=axes)
    return Sums(parts, a.bias, a.dtype, order)


def in_order_of_codes(a: Product) -> Product:
    """The same product, rows of the weight and channels of x in the order of the codes."""
    w, order = a.w.without_order() if a.quantized else (a.w, None)
    if order is None:
        return a
    x = as_array(a.x)
    with mesh_of(x, order):
        x = in_auto_axes(row_order.along, x, order, result=lambda: [*row_axes(x), None])
    return dataclasses.replace(a, x=x, w=w)


def _parts(run, activation, dtype, path, x, w, activation_scale) -> jax.Array:
    quantized, wide = isinstance(w, QuantizedWeight), x.dtype == jnp.float64
    if not quantized or not (wide or is_traced(x, w, activation_scale)):
        return run(Product(x, w, activation, activation_scale, dtype=dtype, path=path))

    def program(x, w, scale):
        return run(Product(x, w, activation, scale, dtype=dtype, path=path))

    if wide:
        program = in_float32(program, activation)
    return transposable(program, derivative.decoded_parts(program), x, w, activation_scale)


# Derivatives of every implementation, where the weight is quantized; of arrays they are JAX's own.
_of_quantized = jax.custom_jvp(_parts, nondiff_argnums=(0, 1, 2, 3))


def _tangent(run, activation, dtype, path, primals, tangents):
    x, w, scale = primals
    dx, dw, dscale = tangents
    parts = _of_quantized(run, activation, dtype, path, x, w, scale)
    moving = derivative.moving(dw)
    derivative.check(w, bool(moving), bool(derivative.moving(dscale)), path)
    terms = []
    if derivative.moving(dx):
        terms.append(derivative.decoded_product(derivative.row_change(x, dx), w))
    if moving:
        rows = derivative.multiplied_rows(as_array(x), activation, scale, path)
        terms.append(derivative.changed_product(rows, w, moving))
    return parts, derivative.as_parts(parts, terms)


_of_quantized.defjvp(_tangent, symbolic_zeros=True)


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
