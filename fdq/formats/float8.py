"""8-bit floats: ``w ~= code * scale`` with float8 codes, e4m3 (to 448) or e5m2 (to 57344).

The scale is absmax / 448 (57344), 1 for all-zero groups; ``float8_e8m0fnu`` scales are rounded up
to a power of two, so that nothing saturates. Values are clipped before the cast, which in JAX
overflows to NaN.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import exact_arithmetic, grouping
from fdq.formats.format import Arrays, ScaledFormat
from fdq.schemes.scheme import WeightSpec


class Float8(ScaledFormat):
    """float8 codes with a scale per tensor, channel, group or block."""

    bits = 8
    granularities = ("tensor", "channel", "group", "block")
    scale_dtypes = (*ScaledFormat.scale_dtypes, "float8_e8m0fnu")

    def __init__(self, name: str, grammar_name: str, dtype: Any, *synonyms: str):
        self.name, self.grammar_name, self.synonyms = name, grammar_name, synonyms
        self.dtype = dtype
        self.largest = float(jnp.finfo(dtype).max)

    def project(self, u: jax.Array, spec: WeightSpec, zero: Any = None) -> jax.Array:
        """The float8 number nearest to ``u``, ties to even, saturating."""
        return jnp.clip(u, -self.largest, self.largest).astype(self.dtype).astype(jnp.float32)

    def to_codes(self, levels: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Levels -> float8."""
        return levels.astype(self.dtype)

    def from_codes(self, codes: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """float8 -> float32."""
        return codes.astype(jnp.float32)

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """The scale that maps the largest magnitude of a group to the largest float8."""
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        scale = exact_arithmetic.quotient(largest, self.largest)
        return self.with_multiplier({}, scale, spec)


E4M3 = Float8("float8_e4m3", "fp8", jnp.float8_e4m3fn, "fp8e4m3")
E5M2 = Float8("float8_e5m2", "fp8e5m2", jnp.float8_e5m2)
