"""Rows of float64, whose range float32 lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fdq.ops.rows import as_array
from fdq.schemes.scheme import ActivationSpec


def in_float32(
    program: Callable[..., jax.Array], activation: ActivationSpec | None
) -> Callable[..., jax.Array]:
    """A product `(x, w, scale, *others) -> [split, ..., N]` of float64 rows by that of float32.

    Rows are divided by powers of two, which rounds nothing, and the float64 result is multiplied.
    """

    def product(x: Any, w: Any, scale: Any, *others: Any) -> jax.Array:
        x = as_array(x)
        if activation is not None and not activation.dynamic:
            # What a calibrated scale cannot hold saturates.
            limit = float(jnp.finfo(jnp.float32).max)
            x = jnp.clip(x, -limit, limit).astype(jnp.float32)
            return program(x, w, scale, *others).astype(jnp.float64)
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
        # Not to the end of the range: powers of two have one too.
        exponent = jnp.clip(jnp.frexp(largest)[1], -1000, 1000)
        y = program(jnp.ldexp(x, -exponent).astype(jnp.float32), w, scale, *others)
        y = y.astype(jnp.float64)
        picks = y.ndim - 1 - exponent.ndim  # of grouped products
        return jnp.ldexp(y, exponent.reshape(1, *exponent.shape[:-1], *[1] * picks, 1))

    return product
