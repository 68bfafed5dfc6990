"""Caches of 8-bit integers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cache.rounding import clip, nearest_integer, quotient
from pallas_kernels.cache.words import CacheWords, as_float
from pallas_kernels.weights.word_format import SIGN_BITS

_TWO_23 = 0x4B000000  # the float 2^23: a byte in its lowest bits adds exactly that byte


class Int8Words(CacheWords):
    """Signed bytes, four a word."""

    format = "int8"
    dtypes = (jnp.int8,)
    bound = 127.0

    def decode(self, words: jax.Array, zero: jax.Array | None = None) -> list[jax.Array]:
        """The codes: made unsigned, they are the lowest bits of 2^23."""
        flipped = words ^ jnp.int32(SIGN_BITS)
        return [_byte(flipped, j) - jnp.float32(2**23 + 128) for j in range(4)]

    def encode(self, x: jax.Array, scale: Any, zero: Any) -> jax.Array:
        """Rounded to nearest even, saturating."""
        bound = jnp.float32(self.bound)
        return nearest_integer(clip(quotient(x, scale), -bound, bound))

    def codes(self, x: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
        """As `encode`."""
        y = jnp.clip(quotient(x, scale), -self.bound, self.bound)
        return jnp.round(y).astype(jnp.int8)


def _byte(words: jax.Array, j: int) -> jax.Array:
    """float32 `2^23 + byte j`."""
    byte = lax.shift_right_logical(words, jnp.full_like(words, 8 * j)) if j else words
    return as_float((byte & jnp.int32(0xFF)) | jnp.int32(_TWO_23))
