"""float8_e4m3 codes: `value = code * scale`, scale = absmax / 448.

Codes are held as their bits, uint8: to slice or update a float8 array XLA's CPU backend widens it
to float16 first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.format import CacheFormat
from fdq.formats.exact_arithmetic import quotient
from fdq.formats.small_float import e4m3_values


class Float8Cache(CacheFormat):
    """8-bit floats with 3 bits of mantissa."""

    name = kernel = "float8_e4m3"
    grammar_name = "fp8"
    synonyms = ("fp8e4m3",)
    code_dtype = jnp.uint8
    bound = 448.0

    def encode(self, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Rounded to nearest even, saturating."""
        y = jnp.clip(quotient(x, scale), -self.bound, self.bound)
        return lax.bitcast_convert_type(y.astype(jnp.float8_e4m3fn), jnp.uint8)

    def decode_planes(self, codes: jax.Array) -> list[jax.Array]:
        """The floats; by their bits, for XLA's own conversion is a slow sequence of selects."""
        return [e4m3_values(codes) * jnp.float32(256)]
