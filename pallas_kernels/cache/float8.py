"""Caches of 8-bit floats."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cache.rounding import clip, nearest_integer, quotient
from pallas_kernels.cache.words import CacheWords, as_float
from pallas_kernels.mosaic.launch import runs_interpreted


class Float8Words(CacheWords):
    """Bits of float8_e4m3fn, four a word."""

    format = "float8_e4m3"
    dtypes = (jnp.uint8,)
    bound = 448.0

    def decode(self, words: jax.Array, zero: jax.Array | None = None) -> list[jax.Array]:
        """The floats."""
        return [_e4m3(words, j) for j in range(4)]

    def encode(self, x: jax.Array, scale: Any, zero: Any) -> jax.Array:
        """Rounded to nearest even, saturating."""
        bound = jnp.float32(self.bound)
        return e4m3_bits(clip(quotient(x, scale), -bound, bound))

    def values(self, codes: jax.Array) -> jax.Array:
        """The floats."""
        return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)

    def codes(self, x: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
        """As `encode`."""
        y = jnp.clip(quotient(x, scale), -self.bound, self.bound)
        return lax.bitcast_convert_type(y.astype(jnp.float8_e4m3fn), jnp.uint8)


def _e4m3(words: jax.Array, j: int) -> jax.Array:
    """float32 value of byte j; NaN (0x7F) reads as 480.

    The byte's exponent and mantissa go to the float's, 120 too low, the sign to its sign. That
    makes float32 subnormals of the byte's, which a GPU multiplies and XLA on CPU flushes to zero.
    """
    top = words << jnp.int32(24 - 8 * j) if j < 3 else words
    bits = (top >> jnp.int32(4)) & jnp.int32(-0x78100000)  # 0x87F00000: the shift copies the sign
    value = as_float(bits) * jnp.float32(2.0**120)
    if not runs_interpreted():
        return value
    mantissa = (bits >> jnp.int32(20)) & jnp.int32(0x7F)
    small = mantissa.astype(jnp.float32) * jnp.float32(2.0**-9)
    small = jnp.where(bits < 0, -small, small)
    return jnp.where(mantissa < 8, small, value)


def e4m3_bits(y: jax.Array) -> jax.Array:
    """float32 up to 448 -> int32 with the bits of float8_e4m3fn, rounded to nearest even."""
    bits = lax.bitcast_convert_type(y, jnp.int32)
    sign = (bits >> jnp.int32(24)) & jnp.int32(0x80)
    bits = bits & jnp.int32(0x7FFFFFFF)
    # 20 bits of the mantissa go, and 120 of the exponent's bias.
    odd = (bits >> jnp.int32(20)) & jnp.int32(1)
    normal = ((bits + jnp.int32(0x7FFFF) + odd) >> jnp.int32(20)) - jnp.int32(120 << 3)
    small = nearest_integer(as_float(bits) * jnp.float32(512))
    return sign | jnp.where(bits < jnp.int32(0x3C800000), small, normal)  # below 2^-6
