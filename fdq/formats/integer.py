"""Integers of 8, 4, 3 and 2 bits: uniform levels, `w ~= (code - zero) * scale (+ offset)`.

==============  =======================  =====================================================
`zero_point`    levels                   stored codes
==============  =======================  =====================================================
`none`          -2^(b-1) .. 2^(b-1) - 1  int8 (8 bits), else offset binary: level + 2^(b-1)
`half`          odd multiples of 1/2     as `none`; zero is the constant -1/2, not stored
`integer`       code - zero              unsigned, 0 .. 2^b - 1; `zero` is uint8
`offset`        code                     as `integer`; `w ~= code * scale + offset`, the offset of
                                         the scale's shape and dtype (MLX, GGUF's Q4_1 and Q4_K)
==============  =======================  =====================================================
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import exact_arithmetic, grouping
from fdq.formats.format import Arrays, Candidates, ScaledFormat
from fdq.schemes.scheme import WeightSpec

# Fractions of the scale that just reaches the largest weight. Below 8 bits the best scale clips.
SEARCH_FRACTIONS = (0.35, 1.15)
SEARCH_POINTS = 48


class Integer(ScaledFormat):
    """Uniform integers of `bits` bits."""

    searchable = row_order = True
    granularities = ("tensor", "channel", "group")

    def __init__(
        self,
        bits: int,
        group_size: int | None,
        *aliases: str,
        zero_points: tuple[str, ...] = ("none", "half", "integer", "offset"),
    ):
        self.bits = bits
        self.name, self.grammar_name = f"int{bits}", str(bits)
        self.synonyms = (f"int{bits}", f"uint{bits}")
        self.group_size, self.zero_points, self.aliases = group_size, zero_points, aliases
        self.lowest, self.highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def reach(self, spec: WeightSpec) -> float:
        """The highest level; with zero points half of all, as weights may have either sign."""
        return self.highest + (0.0 if spec.zero_point == "none" else 0.5)

    def project(self, u: jax.Array, spec: WeightSpec, zero: Any = None) -> jax.Array:
        """The level nearest to `u = w / scale`."""
        if spec.zero_point == "half":
            return jnp.clip(jnp.floor(u), self.lowest, self.highest) + jnp.float32(0.5)
        if spec.zero_point == "integer":
            return jnp.clip(jnp.round(u), 0.0 - zero, 2.0**self.bits - 1.0 - zero)
        if spec.zero_point == "offset":
            return jnp.clip(jnp.round(u), 0.0, 2.0**self.bits - 1.0)
        return jnp.clip(jnp.round(u), self.lowest, self.highest)

    def to_codes(self, levels: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Levels -> int8 (8 bits, signed) or unsigned uint8 codes, not yet packed."""
        if spec.zero_point == "integer":
            return (levels + zero).astype(jnp.uint8)
        if spec.zero_point == "offset":
            return levels.astype(jnp.uint8)
        if spec.zero_point == "half":
            levels = levels - jnp.float32(0.5)
        if self.bits == 8:
            return levels.astype(jnp.int8)
        return (levels - jnp.float32(self.lowest)).astype(jnp.uint8)

    def from_codes(self, codes: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Inverse of `to_codes`, float32; `zero` None leaves it out."""
        levels = codes.astype(jnp.float32)
        offset = self.integer_offset(spec) if zero is None else zero
        return levels if zero is None and not offset else levels - offset

    def integer_offset(self, spec: WeightSpec) -> float:
        """Half of the codes, and the half of half-integer levels."""
        half = 0.5 if spec.zero_point == "half" else 0.0
        shifted = self.bits < 8 and spec.zero_point in ("none", "half")
        return (2.0 ** (self.bits - 1) if shifted else 0.0) - half

    def magnitudes(self, spec: WeightSpec) -> tuple[float, float]:
        """An offset is as large as the weights, and a scale may be a part of what it could be."""
        low, high = super().magnitudes(spec)
        limited = spec.zero_point == "offset" and spec.scale_dtype == "float16"
        return (4.0 * low, 65504.0) if limited else (low, high)

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """The largest magnitude is the highest level; with zero points the range is all codes."""
        groups = grouping.to_groups(w, spec)
        if spec.zero_point == "offset":
            return self._affine(jnp.float32(1.0), *_half_ends(groups), spec)
        if spec.zero_point == "integer":
            half_range, low = _range(groups)
            scale = exact_arithmetic.quotient(half_range, (2**self.bits - 1) / 2)
            return self._asymmetric(scale, low, spec)
        largest = grouping.absolute_maximum(groups)
        reach = self.highest + 0.5 if spec.zero_point == "half" else self.highest
        return self.with_multiplier({}, exact_arithmetic.quotient(largest, reach), spec)

    def candidates(self, w: jax.Array, spec: WeightSpec) -> Candidates:
        """Fractions of the full-range scale, with both signs where the levels are lopsided."""
        groups = grouping.to_groups(w, spec)
        if spec.zero_point == "integer":
            half_range, low = _range(groups)
            full = half_range / jnp.float32((2**self.bits - 1) / 2)
        elif spec.zero_point == "offset":
            ends = _half_ends(groups)
            return Candidates.of_fractions(
                SEARCH_FRACTIONS, SEARCH_POINTS, lambda part: self._affine(part, *ends, spec)
            )
        else:
            low = None
            full = grouping.absolute_maximum(groups) / jnp.float32(2 ** (self.bits - 1) - 0.5)

        def at(fraction: jax.Array) -> Arrays:
            if low is None:
                return self.with_multiplier({}, fraction * full, spec)
            return self._asymmetric(fraction * full, fraction * low, spec)

        return Candidates.of_fractions(SEARCH_FRACTIONS, SEARCH_POINTS, at)

    def with_multiplier(self, parameters: Arrays, scale: jax.Array, spec: WeightSpec) -> Arrays:
        """`parameters` with their scale replaced, rounded to what is stored."""
        # Half-integer levels have no zero: an all-zero group is +-scale / 2.
        empty = None if spec.zero_point == "half" else 1.0
        rounded = grouping.round_scale(scale, spec.scale_dtype, empty=empty)
        return {**parameters, "scale": rounded.astype(spec.scale_dtype)}

    def lopsided(self, spec: WeightSpec) -> bool:
        """Whether a scale of the other sign gives other levels."""
        return spec.zero_point == "none"

    def _asymmetric(self, scale: jax.Array, low: jax.Array, spec: WeightSpec) -> Arrays:
        parameters = self.with_multiplier({}, scale, spec)
        rounded = parameters["scale"].astype(jnp.float32)
        zero = jnp.round(exact_arithmetic.quotient(-low, rounded))
        zero = jnp.clip(zero, 0.0, 2.0**self.bits - 1.0)
        return {**parameters, "zero": zero.astype(jnp.uint8)}

    def _affine(
        self, fraction: jax.Array, high: jax.Array, low: jax.Array, spec: WeightSpec
    ) -> Arrays:
        """Codes over a fraction of each group's range around its middle, from half of its ends."""
        half_range = (high - low) * fraction
        parameters = self.with_multiplier(
            {}, exact_arithmetic.quotient(half_range, (2**self.bits - 1) / 2), spec
        )
        # Rounded to 22 bits, so that XLA cannot fuse the product into the sum.
        less = jax.lax.reduce_precision((high - low) * (1.0 - fraction), 8, 22)
        lowest = low + low + less
        offset = grouping.round_scale(lowest, spec.scale_dtype, empty=0.0)
        return {**parameters, "offset": offset.astype(spec.scale_dtype)}


def _half_ends(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Half of the largest and of the smallest of each group, halved for `_range`'s reason."""
    return jnp.max(groups, axis=-2) * 0.5, jnp.min(groups, axis=-2) * 0.5


def _range(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Half of the largest less the smallest (0 counts) of each group, and the smallest."""
    high = jnp.maximum(jnp.max(groups, axis=-2), 0.0)
    low = jnp.minimum(jnp.min(groups, axis=-2), 0.0)
    # Halved before subtracting: the range of two huge numbers would overflow.
    return high * 0.5 - low * 0.5, low


INT8 = Integer(8, None, "weight_only_int8")
INT4 = Integer(4, 128, "weight_only_int4")
INT3 = Integer(3, 128)
# Four levels are best at odd multiples of scale / 2.
INT2 = Integer(2, 128, zero_points=("half", "none", "integer", "offset"))
