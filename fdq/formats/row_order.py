"""Rows of codes in another order than those of the weight: what GPTQ's `desc_act` leaves behind.

Row j of the codes is row `row_order[j]` of the weight, so that rows which share a scale lie
together. Ops take x in that order and multiply as ever: `x @ w = x[..., row_order] @ codes`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.schemes.scheme import WeightSpec

NAME = "row_order"


def abstract(shape: tuple[int, ...], spec: WeightSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The array beside those of a format, of a weight `[..., K, N]`: int32 `[..., K]`, or none."""
    return {NAME: jax.ShapeDtypeStruct(tuple(shape[:-1]), jnp.int32)} if spec.row_order else {}


def inverse(order: jax.Array) -> jax.Array:
    """Which row of the codes each row of the weight is, `[..., K]`."""
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def of_weight(rows: jax.Array, order: jax.Array) -> jax.Array:
    """Decoded rows `[..., K, N]` of the codes as rows of the weight."""

    def matrix(rows: jax.Array, place: jax.Array) -> jax.Array:
        return along(rows, place, axis=0)

    for _ in range(rows.ndim - 2):
        matrix = jax.vmap(matrix)
    return matrix(rows, inverse(order))


def along(array: Any, order: jax.Array, axis: int = -1) -> jax.Array:
    """What an array has along an axis, in an order `[K]`."""
    return jnp.take(array, order, axis=axis, mode="clip", unique_indices=True)
