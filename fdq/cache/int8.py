"""int8 codes: `value = code * scale`, scale = absmax / 127."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdq.cache.format import CacheFormat
from fdq.formats.exact_arithmetic import quotient


class Int8Cache(CacheFormat):
    """Symmetric 8-bit integers; static per channel it is FastDeploy's C8."""

    name = kernel = "int8"
    grammar_name = "8"
    synonyms = ("int8", "uint8")
    code_dtype = jnp.int8
    bound = 127.0

    def encode(self, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Rounded to nearest even, saturating."""
        codes = jnp.clip(jnp.round(quotient(x, scale)), -self.bound, self.bound)
        return codes.astype(jnp.int8)

    def decode_planes(self, codes: jax.Array) -> list[jax.Array]:
        """The codes in float32."""
        return [codes.astype(jnp.float32)]

    def integer_planes(self, codes: jax.Array) -> list[jax.Array]:
        """The codes."""
        return [codes]
