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

LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0}
DTYPES = {"float8_e4m3": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2}


class Float8(ScaledFormat):
    """float8 codes with a scale per tensor, channel, group or block."""

    bits = 8
    granularities = ("tensor", "channel", "group", "block")
    methods = ("absmax",)

    def __init__(self, name: str):
        self.name = name
        self.dtype = DTYPES[name]
        self.largest = LARGEST[name]

    def project(self, u: jax.Array, spec: WeightSpec, zero: Any = None) -> jax.Array:
        """The float8 number nearest to ``u``, ties to even, saturating."""
        return jnp.clip(u, -self.largest, self.largest).astype(self.dtype).astype(jnp.float32)

    def to_codes(self, levels: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Levels -> float8."""
        return levels.astype(self.dtype)

    def from_codes(self, codes: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """float8 -> float32."""
        return codes.astype(jnp.float32)

    def fit(self, w: jax.Array, spec: WeightSpec, method: str = "absmax") -> Arrays:
        """The scale that maps the largest magnitude of a group to the largest float8."""
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        scale = exact_arithmetic.quotient(largest, self.largest)
        return self.with_multiplier({}, scale, spec)


FORMATS = {name: Float8(name) for name in LARGEST}
