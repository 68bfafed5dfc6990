"""Derivatives of products with quantized weights, the same for every implementation.

They are those of `rows @ dequantize(w)`, where quantized rows count as the values of their codes
and their rounding as the identity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.dots import exact_dot
from fdq.ops.rows import Rows, as_array
from fdq.schemes.scheme import ActivationSpec


def check(w: Any, weight_moves: bool, scale_moves: bool, path: str) -> None:
    """Refuses derivatives by what has none: scales of activations, weights laid out for a device.

    Raises:
      NotImplementedError: one of them moves.
    """
    if scale_moves:
        raise NotImplementedError(
            f"{path}: activation_scale is calibrated and has no derivative here; pass "
            "jax.lax.stop_gradient(activation_scale), or differentiate by other arguments only."
        )
    if weight_moves and isinstance(w, QuantizedWeight) and w.layout != "canonical":
        raise NotImplementedError(
            f"{path}: a weight in the layout {w.layout!r} has no derivative; use fdq.unprepare, or "
            "differentiate by other arguments only."
        )


def moving(tangents: Any) -> dict[int, jax.Array]:
    """Those leaves of symbolic tangents that are not zero, by number."""
    leaves = jax.tree.leaves(tangents, is_leaf=is_zero)
    return {i: leaf for i, leaf in enumerate(leaves) if not is_zero(leaf)}


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is zero whatever the values are, or that of an integer."""
    no_float = getattr(tangent, "dtype", None) == jax.dtypes.float0
    return isinstance(tangent, SymbolicZero) or no_float


def instantiated(tangents: Any, primals: Any) -> Any:
    """Symbolic tangents of floats as arrays."""
    return jax.tree.map(lambda p, t: jnp.zeros_like(p) if is_zero(t) else t, primals, tangents)


def row_change(x: Rows, dx: Any) -> jax.Array:
    """The change of rows as an array, for a tangent of what they are made of."""
    return jax.jvp(as_array, (x,), (instantiated(dx, x),))[1]


def as_parts(like: Any, terms: list[jax.Array]) -> jax.Array:
    """The sum of terms as the parts of a product, `[split, ..., N]`: the first takes all."""
    split, *shape = like.shape
    first = jnp.zeros(shape, like.dtype)
    total = functools.reduce(
        jnp.add, (term.reshape(shape).astype(like.dtype) for term in terms), first
    )
    return jnp.concatenate([total[None], jnp.zeros((split - 1, *shape), like.dtype)])


def decoded_parts(program: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The parts that `program(x, w, scale)` returns, by the decoded weight: linear in x."""

    def parts(x: Rows, w: QuantizedWeight, scale: jax.Array | None) -> jax.Array:
        like = jax.eval_shape(program, x, w, scale)
        return as_parts(like, [decoded_product(as_array(x), w)])

    return parts


def decoding(w: QuantizedWeight, numbers: tuple[int, ...]) -> Callable[..., jax.Array]:
    """`dequantize(w)` as a function of its leaves of these numbers."""
    leaves, structure = jax.tree.flatten(w)

    def decoded(*given: jax.Array) -> jax.Array:
        changed = dict(enumerate(leaves)) | dict(zip(numbers, given, strict=True))
        return dequantize(jax.tree.unflatten(structure, list(changed.values())))

    return decoded


def multiplied_rows(
    x: jax.Array, activation: ActivationSpec | None, scale: jax.Array | None, path: str
) -> jax.Array:
    """The rows that a product multiplies: quantized ones as the values of their codes; float32."""
    if activation is None:
        return x.astype(wide_dtype(x))
    codes, scale = quantize_activation(x, activation, scale, path=path)
    return activation_values(codes, scale, activation.group_size, jnp.float32)


# Checkpointed: what is kept until the backward pass are the codes, not the decoded weight.


def decoded_product(rows: jax.Array, w: QuantizedWeight) -> jax.Array:
    """Rows `[..., K]` times the decoded weight -> float32 (float64) `[M, N]`."""
    return jax.checkpoint(lambda rows, w: _flat_dot(rows, dequantize(w)))(rows, w)


def changed_product(
    rows: jax.Array, w: QuantizedWeight, tangents: dict[int, jax.Array]
) -> jax.Array:
    """Rows times the change of the decoded weight for tangents of its leaves, by number."""
    product = jax.checkpoint(lambda rows, w, tangents: _flat_dot(rows, change(w, tangents)))
    return product(rows, w, tangents)


def change(w: Any, tangents: dict[int, jax.Array]) -> jax.Array:
    """Of a weight's float32 values, for tangents of its leaves by number; an array is one leaf."""
    if not isinstance(w, QuantizedWeight):
        return tangents[0].astype(jnp.float32)
    leaves = jax.tree.leaves(w)
    at = tuple(leaves[i] for i in tangents)
    return jax.jvp(decoding(w, tuple(tangents)), at, tuple(tangents.values()))[1]


def _flat_dot(rows: jax.Array, w: jax.Array) -> jax.Array:
    dtype = wide_dtype(rows)
    return exact_dot(rows.reshape(-1, rows.shape[-1]).astype(dtype), w.astype(dtype))


def wide_dtype(rows: jax.Array) -> Any:
    """float64 for rows of it, which may be beyond the range of float32; else float32."""
    return jnp.float64 if rows.dtype == jnp.float64 else jnp.float32
