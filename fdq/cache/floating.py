"""C16: keys and values as they are, in the dtype of activations or another float dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdq.cache.format import CacheFormat


class Floating(CacheFormat):
    """Floats without scales: what a spec of None means, so no row of `CACHE_FORMATS`."""

    name = "float"
    grammar_name = "16"
    bound = 1.0

    def encode(self, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Nothing to do."""
        return x

    def decode_planes(self, codes: jax.Array) -> list[jax.Array]:
        """The numbers in float32."""
        return [codes.astype(jnp.float32)]


FLOATING = Floating()
