"""Unsigned integers of a few bits with zero points, several channels in one byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdq.cache.format import SMALLEST_RANGE, CacheFormat
from fdq.formats.exact_arithmetic import quotient


class PackedInteger(CacheFormat):
    """`value = (code - zero) * scale`, codes 0 .. bound packed along D, the first channel lowest.

    As many channels as a format has `planes` fill whole bytes. Where these are several, the first
    of all such channels come first, then all second ones: slices of them are contiguous.
    """

    code_dtype = jnp.uint8
    has_zero = True

    @property
    def bits(self) -> int:
        """Of a code."""
        return int(self.bound).bit_length()

    @property
    def _bytes(self) -> int:
        """Of one channel of each plane."""
        return self.planes * self.bits // 8

    def width(self, head_dim: int) -> int:
        """Bytes of `head_dim` channels."""
        if head_dim % self.planes:
            of = (
                "an even head_dim" if self.planes == 2 else f"a head_dim divisible by {self.planes}"
            )
            raise ValueError(f"{self.name} KV cache needs {of}, got {head_dim}")
        return head_dim // self.planes * self._bytes

    def head_dim(self, width: int) -> int:
        """Channels of `width` bytes."""
        return width // self._bytes * self.planes

    def token_range(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both ends of each token, extended to 0."""
        return jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)

    def fit(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point; the range is extended to 0, which a code then stands for."""
        high, low = jnp.maximum(high, 0.0), jnp.minimum(low, 0.0)
        scale = quotient(jnp.maximum(high - low, jnp.float32(SMALLEST_RANGE)), self.bound)
        return scale, jnp.clip(jnp.round(quotient(-low, scale)), 0.0, self.bound)

    def encode(self, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """uint8 `[..., bytes]`."""
        assert zero is not None
        whole = jnp.floor(zero)
        codes = jnp.round(quotient(x, scale) + (zero - whole)) + whole
        return self.pack(jnp.clip(codes, 0.0, self.bound).astype(jnp.uint8))

    def pack(self, codes: jax.Array) -> jax.Array:
        """uint8 codes `[..., D]` -> bytes."""
        each = codes.reshape(*codes.shape[:-1], -1, self.planes)
        if self._bytes == 1:
            word = each[..., 0]
            for p in range(1, self.planes):
                word = word | each[..., p] << jnp.uint8(p * self.bits)
            return word
        word = each[..., 0].astype(jnp.uint32)
        for p in range(1, self.planes):
            word = word | each[..., p].astype(jnp.uint32) << jnp.uint32(p * self.bits)
        parts = [word >> jnp.uint32(8 * i) for i in range(self._bytes)]
        packed = (jnp.stack(parts, axis=-2) & jnp.uint32(255)).astype(jnp.uint8)
        return packed.reshape(*packed.shape[:-2], -1)

    def decode_planes(self, codes: jax.Array) -> list[jax.Array]:
        """Every `planes`-th channel, from the first, the second, and so on."""
        return [plane.astype(jnp.float32) for plane in self.integer_planes(codes)]

    def integer_planes(self, codes: jax.Array) -> list[jax.Array]:
        """The same in int8."""
        word, mask = codes, jnp.uint8(int(self.bound))
        if self._bytes > 1:
            units = codes.shape[-1] // self._bytes
            parts = codes.reshape(*codes.shape[:-1], self._bytes, units).astype(jnp.uint32)
            word, mask = parts[..., 0, :], jnp.uint32(int(self.bound))
            for i in range(1, self._bytes):
                word = word | parts[..., i, :] << jnp.uint32(8 * i)
        shifts = (word.dtype.type(p * self.bits) for p in range(self.planes))
        return [((word >> shift) & mask).astype(jnp.int8) for shift in shifts]
