"""Caches of floats."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cache.words import CacheWords, as_float


class FloatWords(CacheWords):
    """Floats as they are; two bfloat16 are a word, others are read one by one."""

    format = None
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32)

    @property
    def per_word(self) -> int:
        """Halves of a word are floats only of bfloat16."""
        return 2 if self.dtype == jnp.bfloat16 else 1

    def decode(self, words: jax.Array, zero: jax.Array | None = None) -> list[jax.Array]:
        """The numbers."""
        if self.planes == 1:
            return [words.astype(jnp.float32)]
        high = words & jnp.int32(-0x10000)
        return [as_float(words << jnp.int32(16)), as_float(high)]

    def encode(self, x: jax.Array, scale: Any, zero: Any) -> jax.Array:
        """The numbers."""
        return x

    def codes(self, x: jax.Array, scale: Any, zero: Any) -> jax.Array:
        """The numbers."""
        return x
