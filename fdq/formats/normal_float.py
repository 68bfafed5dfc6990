"""NF4: 16 levels at quantiles of a normal distribution, `w ~= level * scale`, groups of 64.

Source: QLoRA (arXiv 2305.14314), appendix E. With
`double_quantization` the scales are int8 codes themselves, `scale = code * super_scale +
scale_offset`: `super_scale` is shared by 256 columns of one row of scales, `scale_offset` (the
mean) by the matrix. That stores 4.127 bits per weight instead of 4.25.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq.formats import exact_arithmetic, grouping
from fdq.formats.format import Arrays, Candidates, ScaledFormat
from fdq.schemes.scheme import WeightSpec
from pallas_kernels.weights.nf4_levels import NF4_LEVELS

CODEBOOK = np.array(NF4_LEVELS, np.float32)
MIDPOINTS = ((CODEBOOK[1:].astype(np.float64) + CODEBOOK[:-1]) / 2).astype(np.float32)

SUPER_COLUMNS = 256
SEARCH_FRACTIONS = (0.55, 1.15)
SEARCH_POINTS = 25


class NormalFloat(ScaledFormat):
    """NF4 with a scale per group of rows."""

    name = "nf4"
    grammar_name = "NF4"
    aliases = ("nf4",)
    bits = 4
    group_size = 64
    double_quantization = True
    searchable = True

    def magnitudes(self, spec: WeightSpec) -> tuple[float, float]:
        """With double quantization scales have 7 bits more."""
        low, high = super().magnitudes(spec)
        return (low * 127.0, high) if spec.double_quantization else (low, high)

    def array_names(self, spec: WeightSpec) -> tuple[str, ...]:
        """Double quantization adds the scales of the scales, and their mean."""
        second = ("super_scale", "scale_offset") if spec.double_quantization else ()
        return ("codes", "scale", *second)

    def project(self, u: jax.Array, spec: WeightSpec, zero: Any = None) -> jax.Array:
        """The level nearest to `u = w / scale`."""
        level = jnp.full_like(u, CODEBOOK[0])
        for value, midpoint in zip(CODEBOOK[1:], MIDPOINTS, strict=True):
            level = jnp.where(u > midpoint, value, level)
        return level

    def to_codes(self, levels: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Levels -> indices into the codebook, uint8."""
        codes = jnp.zeros(levels.shape, jnp.uint8)
        for midpoint in MIDPOINTS:
            codes = codes + (levels > midpoint).astype(jnp.uint8)
        return codes

    def from_codes(self, codes: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Indices -> levels: a tree of selects, which is faster than a gather."""
        values: list[Any] = list(CODEBOOK)
        for bit in range(4):
            is_set = (codes & jnp.uint8(1 << bit)) != 0
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [jnp.where(is_set, high, low) for low, high in pairs]
        return values[0]

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """The largest magnitude of a group is its scale."""
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        return self.with_multiplier({}, largest, spec)

    def candidates(self, w: jax.Array, spec: WeightSpec) -> Candidates:
        """Fractions of the absmax scale, of both signs: the levels are not symmetric."""
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))

        def at(fraction: jax.Array) -> Arrays:
            return self.with_multiplier({}, fraction * largest, spec)

        return Candidates.of_fractions(SEARCH_FRACTIONS, SEARCH_POINTS, at)

    def lopsided(self, spec: WeightSpec) -> bool:
        """A scale of the other sign gives other levels."""
        return True

    def multiplier(self, parameters: Arrays, spec: WeightSpec) -> jax.Array:
        """The float32 scale of each group, doubly quantized or not."""
        scale = parameters["scale"].astype(jnp.float32)
        if "super_scale" not in parameters:
            return scale
        step = grouping.repeat_last(parameters["super_scale"], SUPER_COLUMNS, scale.shape[-1])
        return exact_arithmetic.product(scale, step) + parameters["scale_offset"]

    def finish(self, parameters: Arrays, spec: WeightSpec) -> Arrays:
        """Quantizes the scales, if the spec says so."""
        if not spec.double_quantization:
            return parameters
        scale = parameters["scale"].astype(jnp.float32)
        *lead, rows, n = scale.shape
        # Divided by a power of two first, which rounds nothing: sums of huge scales overflow.
        largest = jnp.max(jnp.abs(scale), axis=(-2, -1), keepdims=True)
        size = grouping.power_of_two(jnp.clip(grouping.floor_log2(largest), -126, 126))
        mean = jnp.mean(scale / size, axis=(-2, -1), keepdims=True) * size
        # Ten bits: the rest of a long sum depends on how XLA orders it.
        offset = jax.lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=10)
        shifted = scale - offset
        pad = [(0, 0)] * (len(lead) + 1) + [(0, -n % SUPER_COLUMNS)]
        blocks = jnp.pad(shifted, pad).reshape(*lead, rows, -1, SUPER_COLUMNS)
        largest = jnp.max(jnp.abs(blocks), axis=-1)
        step = grouping.round_scale(exact_arithmetic.quotient(largest, 127.0), "float32")
        wide = grouping.repeat_last(step, SUPER_COLUMNS, n)
        codes = jnp.clip(jnp.round(exact_arithmetic.quotient(shifted, wide)), -127.0, 127.0)
        return {"scale": codes.astype(jnp.int8), "super_scale": step, "scale_offset": offset}

    def with_multiplier(self, parameters: Arrays, scale: jax.Array, spec: WeightSpec) -> Arrays:
        """`parameters` with their scale replaced, rounded to what is stored."""
        if not spec.double_quantization:
            return super().with_multiplier(parameters, scale, spec)
        # Rounded only in `finish`. All-zero groups follow the others: a scale of 1 among scales
        # of 0.05 would spoil the 8-bit steps of its neighbours.
        usable = jnp.abs(scale) >= grouping.SMALLEST_NORMAL
        largest = jnp.max(jnp.abs(scale), axis=(-2, -1), keepdims=True)
        spare = grouping.round_scale(largest, "float32")
        return {**parameters, "scale": jnp.where(usable, scale, spare)}


NF4 = NormalFloat()
