"""Products with weights that are arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.ops.choice import choose_program, trace_target
from fdq.ops.dots import exact_dot
from fdq.ops.matmul.fused import fused_product
from fdq.ops.placement import in_auto_axes, spec_entries
from fdq.ops.weight_view import view_array
from pallas_kernels.typing import Array, Float


def _wider(x: Any, w: Any) -> Any:
    """The dtype of a product, whatever the user's code is allowed to promote."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(x.dtype, w.dtype)


def dense_product(x: Float[Array, "m k"], w: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """`x [M, K] @ w [K, N]` for float arrays, in the wider dtype of the two -> float32.

    XLA's CPU backend converts a 16-bit weight to float32 as a whole for one row of x: that is a
    fusion like that of quantized weights instead.
    """
    dtype = _wider(x, w)
    if x.shape[0] == 1 and dtype.itemsize == 2 and trace_target().platform == "cpu":
        return _sixteen_bit_row(x.astype(dtype), w.astype(dtype))
    return exact_dot(x.astype(dtype), w.astype(dtype))


@jax.custom_jvp
def _sixteen_bit_row(x: jax.Array, w: jax.Array) -> jax.Array:
    x, w = lax.optimization_barrier((x, w))  # as in quantized_product
    choice = choose_program("array", 1, w.size)
    size = choice.size if choice.name == "fused" else 8
    return fused_product(x.astype(jnp.float32), view_array(w), size, dot=True)


@_sixteen_bit_row.defjvp
def _sixteen_bit_row_tangent(primals, tangents):
    x, w, dx, dw = (a.astype(jnp.float32) for a in (*primals, *tangents))
    return _sixteen_bit_row(*primals), exact_dot(dx, w) + exact_dot(x, dw)


def transposed_matmul(
    x: Float[Array, "*m k"], w: Float[Array, "n k"], *, out_dtype: Any = None
) -> Float[Array, "*m n"]:
    """`x @ w.T` for an array `w [N, K]`, summed in float32, without forming `w.T`.

    One row of 16-bit floats is padded to two on CPU, where XLA would otherwise convert the whole
    weight to float32 first. `out_dtype` is that of x by default.
    """
    dtype = _wider(x, w)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)

    def product(x, w):
        rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        m = rows.shape[0]
        if m == 1 and dtype.itemsize == 2 and trace_target().platform == "cpu":
            rows = jnp.concatenate([rows, jnp.zeros_like(rows)], axis=0)
        y = exact_dot(rows, w.astype(dtype), axis=1)[:m].astype(out_dtype)
        return y.reshape(*x.shape[:-1], w.shape[0])

    return in_auto_axes(product, x, w, result=lambda: spec_entries(x)[:-1] + spec_entries(w)[:1])
