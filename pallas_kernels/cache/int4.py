"""Caches of 4-bit integers with zero points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cache.rounding import at_least, clip, nearest_integer, quotient
from pallas_kernels.cache.words import SMALLEST_MAXIMUM, CacheWords, as_float

_SIXTEEN = 0x41800000  # the float 16: a nibble in bits 19 .. 22 adds exactly that nibble


class Int4Words(CacheWords):
    """Nibbles, the even channel in the low one of a byte, eight a word."""

    format = "int4"
    dtypes = (jnp.uint8,)
    packed = 2
    has_zero = True
    bound = 15.0
    middle = 8.0

    def decode(self, words: jax.Array, zero: jax.Array | None = None) -> list[jax.Array]:
        """The codes minus 8, or minus the zero point."""
        offset = jnp.float32(16 + self.middle) if zero is None else zero
        return [_nibble(words, j) - offset for j in range(8)]

    def zero_of(self, points: jax.Array) -> jax.Array:
        """A nibble is read as 16 more."""
        return points + jnp.float32(16)

    def fit(
        self, x: list[jax.Array], largest: Callable[[list[jax.Array]], jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        """Of a range that is extended to 0."""
        none = jnp.float32(0)
        high = largest([jnp.where(one > 0, one, none) for one in x])
        low = largest([jnp.where(one < 0, -one, none) for one in x])
        wide = quotient(at_least(high + low, SMALLEST_MAXIMUM), jnp.float32(self.bound))
        zero = nearest_integer(quotient(low, wide)).astype(jnp.float32)
        return wide, clip(zero, none, jnp.float32(15))

    def encode(self, x: jax.Array, scale: Any, zero: Any) -> jax.Array:
        """Rounded to nearest even, saturating."""
        near = clip(quotient(x, scale), jnp.float32(-32), jnp.float32(32))
        code = nearest_integer(near) + nearest_integer(zero)
        return clip(code, jnp.int32(0), jnp.int32(15))

    def pack(self, codes: list[jax.Array]) -> list[jax.Array]:
        """Neighbouring channels are neighbouring pieces in either order of rotation."""
        pairs = zip(codes[::2], codes[1::2], strict=True)
        return [low | high << jnp.int32(4) for low, high in pairs]

    def values(self, codes: jax.Array) -> jax.Array:
        """Both nibbles of each byte."""
        nibbles = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=-1)
        return nibbles.reshape(*codes.shape[:-1], -1).astype(jnp.float32)

    def parameters(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Of a range that is extended to 0."""
        high = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0.0)
        low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0.0)
        wide = jnp.maximum(high - low, jnp.float32(SMALLEST_MAXIMUM))
        scale = quotient(wide, jnp.float32(self.bound))
        return scale, jnp.clip(jnp.round(quotient(-low, scale)), 0.0, 15.0)

    def codes(self, x: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
        """As `encode`."""
        codes = jnp.clip(jnp.round(quotient(x, scale)) + zero, 0.0, 15.0).astype(jnp.uint8)
        return codes[..., 0::2] | codes[..., 1::2] << jnp.uint8(4)


def _nibble(words: jax.Array, j: int) -> jax.Array:
    """float32 `16 + nibble j`."""
    shift = 19 - 4 * j
    moved = words << jnp.int32(shift) if shift > 0 else words >> jnp.int32(-shift)
    return as_float((moved & jnp.int32(0x780000)) | jnp.int32(_SIXTEEN))
