"""`matmul` in plain XLA: every device, any shape."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.ops.activation import (
    activation_values,
    check_activation_scale,
    integer_product,
    quantize_activation,
)
from fdq.ops.choice import Target, choose_program, trace_target, traced_for
from fdq.ops.dots import exact_dot, left_dot
from fdq.ops.implementation import Implementation
from fdq.ops.matmul.dense import dense_product
from fdq.ops.matmul.fused import fused_product, looked_up_product
from fdq.ops.matmul.product import Product, takes_integers
from fdq.ops.matmul.weight_only import (
    blocked,
    plane_product,
    split_product,
    tiled,
    transposed_product,
)
from fdq.ops.prepared_weight import TransposedWeight, WordsWeight
from fdq.ops.rows import as_array
from fdq.ops.weight_view import WeightView, has_table, view_weight, view_words
from fdq.schemes.scheme import ActivationSpec


class Xla(Implementation[Product]):
    """Which XLA program suits device, format, rows and size is chosen by `fdq.ops.choice`."""

    name = "xla"

    def __call__(self, arguments: Product) -> jax.Array:
        """One part, `[1, ..., N]`."""
        a, x = arguments, as_array(arguments.x)
        rows = x if x.ndim == 2 else x.reshape(a.rows, x.shape[-1])
        multiply = quantized_product if a.quantized else _dense_rows
        y = multiply(rows, a.w, a.activation, a.activation_scale, path=a.path)
        return y.reshape(1, *x.shape[:-1], y.shape[-1])


def _dense_rows(rows, w, activation, activation_scale, *, path) -> jax.Array:
    if activation is not None:
        codes, scale = quantize_activation(rows, activation, activation_scale, path=path)
        quantized = activation_values(codes, scale, activation.group_size, rows.dtype)
        # Straight through: the value of the quantized x, the gradient of x.
        rows = rows + lax.stop_gradient(quantized - rows)
    return dense_product(rows, w)


def quantized_product(
    x: jax.Array,
    q: QuantizedWeight,
    activation: ActivationSpec | None,
    activation_scale: jax.Array | None = None,
    *,
    path: str = "<array>",
) -> jax.Array:
    """`[M, K]` times a weight `[K, N]` -> float32 `[M, N]`; no gradient where a loop is chosen."""
    if activation is not None:
        check_activation_scale(activation, activation_scale, path)
    return _quantized_product(x, q, activation_scale, activation, traced_for())


@functools.partial(jax.jit, static_argnums=(3, 4))
def _quantized_product(
    x: jax.Array,
    q: QuantizedWeight,
    activation_scale: jax.Array | None,
    activation: ActivationSpec | None,
    _: Hashable,
) -> jax.Array:
    """Traced once for all layers whose weights have one shape and one spec."""
    if x.shape[0] == 0:
        return jnp.zeros((0, q.shape[-1]), jnp.float32)
    target, n = trace_target(), q.shape[-1]
    # Ties the weight to x. In a decode loop XLA would otherwise move the decoding, which does not
    # depend on the token, out of the loop, and every step would read float32 weights from memory.
    x, q = lax.optimization_barrier((x, q))
    if activation is None:
        return _product(x, q, target)[:, :n]
    codes, scale = quantize_activation(x, activation, activation_scale)
    if activation.granularity == "token_group":
        # Exact products of codes, each slice of K scaled by its activation scale.
        values = activation_values(codes, scale, activation.group_size, jnp.float32)
        return _product(values, q, target)[:, :n]
    if takes_integers(q, activation):
        return _integer_rows(codes, q, target)[:, :n] * scale
    return _product(codes.astype(jnp.float32), q, target)[:, :n] * scale


def _view(q: QuantizedWeight) -> WeightView | None:
    """How packed units are read where they lie, a checkpoint's or a kernel's."""
    return view_words(q.data) if isinstance(q, WordsWeight) else view_weight(q.canonical())


def _integer_rows(codes: jax.Array, q: QuantizedWeight, target: Target) -> jax.Array:
    """int8 rows times integer weights, before the activation scale."""
    if isinstance(q, TransposedWeight):
        sums = left_dot(q.data.codes, codes).astype(jnp.float32)
        return sums * q.data.scale.astype(jnp.float32)
    view = _view(q)
    if view is None:
        return _product(codes.astype(jnp.float32), q, target)
    if target.platform != "cpu":
        return integer_product(codes, view)
    return _chosen_program(f"{view.format.name} x int8", integer_product, codes, view)


# Beyond this many rows a fusion per row reads the codes too often.
_FUSED_ROWS = 4


def _product(x: jax.Array, q: QuantizedWeight, target: Target) -> jax.Array:
    """Float rows times a QTensor, by the program that suits the device."""
    if isinstance(q, TransposedWeight):
        return transposed_product(x, q)
    view = _view(q)
    if view is None:
        return exact_dot(x.astype(jnp.float32), dequantize(q))
    if target.platform == "cpu":
        product = functools.partial(plane_product, joined=True)
        return _chosen_program(view.format.name, product, x.astype(jnp.float32), view)
    if number_of_rows(x) <= _FUSED_ROWS:
        # XLA spreads the reduction in the fusion over threads: nothing to unroll.
        return fused_product(x.astype(jnp.float32), view, 1, dot=False)
    return plane_product(x, view, compute_dtype(x.dtype, target))


def compute_dtype(dtype: Any, target: Target) -> Any:
    """What a dot computes in: the dtype of x, but float16 where bfloat16 is emulated."""
    emulated = dtype == jnp.bfloat16 and not target.has_bfloat16
    return jnp.float16 if emulated else dtype


_MANY_ROWS = 1 << 30


def number_of_rows(x: Any) -> int:
    """M of `[M, K]`; many where it is a symbol, as in an export for any batch."""
    return x.shape[0] if isinstance(x.shape[0], int) else _MANY_ROWS


def _chosen_program(path: str, product: Any, x: jax.Array, view: WeightView) -> jax.Array:
    """`product(x, view)` on CPU, by the program that `fdq.ops.choice` names."""
    choice = choose_program(path, number_of_rows(x), view.rows * view.columns)
    match choice.name:
        case "fused":
            return fused_product(x.astype(jnp.float32), view, choice.size, dot=True)
        case "lookup" if has_table(view):
            return looked_up_product(x.astype(jnp.float32), view, choice.size)
        case "split" if view.format.integer_offset(view.spec) is not None:
            return blocked(split_product, x, view, choice.size)
        case "table":
            looked_up = functools.partial(plane_product, joined=True, looked_up=True)
            return blocked(looked_up, x.astype(jnp.float32), view, choice.size)
        case "tiles":
            return tiled(product, x, view, choice.size)
        case "blocks":
            return blocked(product, x, view, choice.size)
    return product(x, view)
