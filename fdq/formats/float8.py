"""8-bit floats: `w ~= code * scale` with float8 codes, e4m3 (to 448) or e5m2 (to 57344).

The scale of all-zero groups is 1; `float8_e8m0fnu` scales are rounded up, so nothing saturates.
"""

from __future__ import annotations

import jax

from fdq.formats import exact_arithmetic, grouping, small_float
from fdq.formats.format import Arrays, ScaledFormat
from fdq.schemes.scheme import WeightSpec


class ScaledFloat8(small_float.FloatLevels):
    """float8 codes with a scale per tensor, channel, group or block."""

    granularities = ("tensor", "channel", "group", "block")
    scale_dtypes = (*ScaledFormat.scale_dtypes, "float8_e8m0fnu")

    def __init__(self, name: str, grammar_name: str, element: small_float.Float8, *synonyms: str):
        super().__init__(element)
        self.name, self.grammar_name, self.synonyms = name, grammar_name, synonyms

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """The scale that maps the largest magnitude of a group to the largest float8."""
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        scale = exact_arithmetic.quotient(largest, self.element.largest)
        return self.with_multiplier({}, scale, spec)


E4M3 = ScaledFloat8("float8_e4m3", "fp8", small_float.E4M3, "fp8e4m3")
E5M2 = ScaledFloat8("float8_e5m2", "fp8e5m2", small_float.E5M2)
