"""Rounding and division that every GPU and the interpreter do alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TO_INTEGER = 1.5 * 2**23
"""A float32 of this size has no fraction left: adding it rounds to integers."""

TO_INTEGER_BITS = 0x4B400000


def nearest_integer(x: jax.Array) -> jax.Array:
    """float32 below 2^22 -> the nearest int32, ties to even."""
    bits = lax.bitcast_convert_type(x + jnp.float32(TO_INTEGER), jnp.int32)
    return bits - jnp.int32(TO_INTEGER_BITS)


def rounding(dtype: Any):
    """Rounds float32 to `dtype` and back."""
    return lambda x: x.astype(dtype).astype(jnp.float32)


def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b` rounded once: XLA multiplies by the reciprocal of what it sees is a broadcast."""
    return a / jnp.where(a != a, a, b)


def at_least(x: jax.Array, least: float) -> jax.Array:
    """The larger of both, with instructions that T4 has."""
    return jnp.where(x > least, x, jnp.float32(least))


def clip(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`x` between both ends, likewise."""
    x = jnp.where(x > high, high, x)
    return jnp.where(x < low, low, x)
