"""4-bit codes with zero points: `value = (code - zero) * scale`, codes 0 .. 15.

Codes are packed along D, the even channel in the low nibble. Dynamic scales and zero points take
40 / D bits an element.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdq.cache.format import SMALLEST_RANGE, CacheFormat
from fdq.formats.exact_arithmetic import quotient


class Int4Cache(CacheFormat):
    """Asymmetric 4-bit integers, two channels a byte; scale = (max - min) / 15."""

    name = kernel = "int4"
    grammar_name = "4"
    synonyms = ("int4", "uint4")
    code_dtype = jnp.uint8
    bound = 15.0
    has_zero = True
    planes = 2

    def width(self, head_dim: int) -> int:
        """Bytes of `head_dim` channels."""
        if head_dim % 2:
            raise ValueError(f"int4 KV cache needs an even head_dim, got {head_dim}")
        return head_dim // 2

    def head_dim(self, width: int) -> int:
        """Channels of `width` bytes."""
        return 2 * width

    def token_range(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both ends of each token, extended to 0."""
        return jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)

    def fit(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point; the range is extended to 0, which a code then stands for."""
        high, low = jnp.maximum(high, 0.0), jnp.minimum(low, 0.0)
        scale = quotient(jnp.maximum(high - low, jnp.float32(SMALLEST_RANGE)), self.bound)
        return scale, jnp.clip(jnp.round(quotient(-low, scale)), 0.0, self.bound)

    def encode(self, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """uint8 `[..., D / 2]`."""
        assert zero is not None
        codes = jnp.clip(jnp.round(quotient(x, scale)) + zero, 0.0, self.bound).astype(jnp.uint8)
        pairs = codes.reshape(*codes.shape[:-1], -1, 2)
        return pairs[..., 0] | pairs[..., 1] << jnp.uint8(4)

    def decode_planes(self, codes: jax.Array) -> list[jax.Array]:
        """The even and the odd channels."""
        return [plane.astype(jnp.float32) for plane in self.integer_planes(codes)]

    def integer_planes(self, codes: jax.Array) -> list[jax.Array]:
        """The even and the odd channels, 0 .. 15."""
        return [(codes & jnp.uint8(15)).astype(jnp.int8), (codes >> jnp.uint8(4)).astype(jnp.int8)]
