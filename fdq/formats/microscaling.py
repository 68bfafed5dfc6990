"""Small floats with a small float as the scale of a short group: MXFP4, MXFP8 and NVFP4.

=========  ===========  =====  ==========================  ==================================
format     codes        group  scale                       value
=========  ===========  =====  ==========================  ==================================
``mxfp4``  e2m1 packed  32     e8m0, a power of two        level * scale
``mxfp8``  float8_e4m3  32     e8m0, a power of two        level * scale
``nvfp4``  e2m1 packed  16     e4m3 times a float32 of     level * scale * global_scale
                               the matrix
=========  ===========  =====  ==========================  ==================================

e2m1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, the sign in bit 3. Sources: OCP
Microscaling Formats 1.0 (section 6.3 for the exponent: ``floor(log2(absmax)) - 2`` for e2m1, which
saturates); NVIDIA's NVFP4 (``global_scale = absmax / (6 * 448)``); four-over-six, arXiv 2512.02010.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import exact_arithmetic, grouping
from fdq.formats.format import Arrays, Candidates, ScaledFormat
from fdq.schemes.scheme import WeightSpec

LARGEST_E2M1 = 6.0
LARGEST_E4M3 = 448.0

# Largest block scale when scales may be raised above absmax / 6 (to absmax / 4 and a bit more).
HEADROOM_E4M3 = 256.0
# e4m3 numbers, as steps in their bits, around absmax / 6 that the search of nvfp4 tries: 8 steps
# are a factor of 2.
SWEEP = (-6, 7)


def project_e2m1(u: jax.Array) -> jax.Array:
    """The e2m1 number nearest to ``u``, ties to even mantissas, saturating."""
    magnitude = jnp.minimum(jnp.abs(u), jnp.float32(LARGEST_E2M1))
    step = jnp.where(
        magnitude < 2.0, jnp.float32(0.5), jnp.where(magnitude < 4.0, jnp.float32(1.0), 2.0)
    )
    inverse = jnp.where(
        magnitude < 2.0, jnp.float32(2.0), jnp.where(magnitude < 4.0, jnp.float32(1.0), 0.5)
    )
    return jnp.sign(u) * (jnp.round(magnitude * inverse) * step)


def e2m1_to_codes(levels: jax.Array) -> jax.Array:
    """e2m1 numbers as float32 -> their 4 bits, uint8."""
    magnitude = jnp.abs(levels)
    doubled = jnp.where(magnitude < 4.0, magnitude + 2.0, 0.5 * magnitude + 4.0)
    index = jnp.where(magnitude < 2.0, 2.0 * magnitude, doubled)
    return index.astype(jnp.uint8) | ((levels < 0).astype(jnp.uint8) << jnp.uint8(3))


def e2m1_from_codes(codes: jax.Array) -> jax.Array:
    """4 bits, uint8 -> float32, by arithmetic (faster than a gather)."""
    exponent = ((codes >> jnp.uint8(1)) & jnp.uint8(3)).astype(jnp.int32)
    mantissa = (codes & jnp.uint8(1)).astype(jnp.float32)
    normal = (1.0 + 0.5 * mantissa) * grouping.power_of_two(exponent - 1)
    magnitude = jnp.where(exponent == 0, 0.5 * mantissa, normal)
    return jnp.where((codes & jnp.uint8(8)) != 0, -magnitude, magnitude)


class MicroscalingFloat(ScaledFormat):
    """MXFP4 and MXFP8: the scale is a power of two."""

    group_size = 32
    scale_dtypes = ("float8_e8m0fnu",)
    fixed = True
    searchable = True

    def __init__(self, bits: int, largest_exponent: int, *synonyms: str):
        self.name, self.grammar_name, self.synonyms = f"mxfp{bits}", f"MXFP{bits}", synonyms
        self.aliases = (self.name,)
        self.bits = bits
        self.largest_exponent = largest_exponent

    def project(self, u: jax.Array, spec: WeightSpec, zero: Any = None) -> jax.Array:
        """The level nearest to ``u = w / scale``."""
        if self.bits == 4:
            return project_e2m1(u)
        clipped = jnp.clip(u, -LARGEST_E4M3, LARGEST_E4M3)
        return clipped.astype(jnp.float8_e4m3fn).astype(jnp.float32)

    def to_codes(self, levels: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Levels -> e2m1 bits in uint8, or float8."""
        return e2m1_to_codes(levels) if self.bits == 4 else levels.astype(jnp.float8_e4m3fn)

    def from_codes(self, codes: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Inverse of ``to_codes``, float32."""
        return e2m1_from_codes(codes) if self.bits == 4 else codes.astype(jnp.float32)

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """OCP's rule: the exponent of the absmax less that of the largest level."""
        return self._scale(self._exponent(w, spec))

    def candidates(self, w: jax.Array, spec: WeightSpec) -> Candidates:
        """The exponent of OCP's rule, one less and one more."""
        exponent = self._exponent(w, spec)
        return Candidates(3, lambda i: self._scale(exponent + i - 1), refit=False)

    def _exponent(self, w: jax.Array, spec: WeightSpec) -> jax.Array:
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        exponent = grouping.floor_log2(largest) - self.largest_exponent
        return jnp.where(largest >= grouping.SMALLEST_NORMAL, exponent, 0)

    def _scale(self, exponent: jax.Array) -> Arrays:
        power = grouping.power_of_two(jnp.clip(exponent, -126, 127))
        return {"scale": power.astype(jnp.float8_e8m0fnu)}


class NvidiaFloat4(ScaledFormat):
    """NVFP4: e4m3 scales of 16 rows, and one float32 for the matrix."""

    name = "nvfp4"
    grammar_name = "NVFP4"
    aliases = ("nvfp4", "modelopt_fp4")
    bits = 4
    group_size = 16
    scale_dtypes = ("float8_e4m3fn",)
    fixed = True
    searchable = True

    def array_names(self, spec: WeightSpec) -> tuple[str, ...]:
        """`global_scale` `[..., 1, 1]` float32 multiplies the whole matrix."""
        return ("codes", "scale", "global_scale")

    def project(self, u: jax.Array, spec: WeightSpec, zero: Any = None) -> jax.Array:
        """The level nearest to ``u = w / scale``."""
        return project_e2m1(u)

    def to_codes(self, levels: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Levels -> e2m1 bits in uint8."""
        return e2m1_to_codes(levels)

    def from_codes(self, codes: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Inverse of ``to_codes``, float32."""
        return e2m1_from_codes(codes)

    def multiplier(self, parameters: Arrays, spec: WeightSpec) -> jax.Array:
        """Block scale times global scale."""
        return parameters["scale"].astype(jnp.float32) * parameters["global_scale"]

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """The largest magnitude of a group is level 6."""
        sixth, global_scale = self.sixth(w, spec, LARGEST_E4M3)
        return self.parameters(sixth, global_scale)

    def columns_apart(self, spec: WeightSpec) -> bool:
        """The global scale is that of all columns."""
        return False

    def candidates(self, w: jax.Array, spec: WeightSpec) -> Candidates:
        """Neighbouring e4m3 numbers around absmax / 6 (ScaleSweep, arXiv 2606.07618)."""
        sixth, global_scale = self.sixth(w, spec, HEADROOM_E4M3)
        nearest = self.parameters(sixth, global_scale)["scale"]
        bits = jax.lax.bitcast_convert_type(nearest, jnp.uint8).astype(jnp.int32)

        def at(i: jax.Array) -> Arrays:
            # Positive e4m3 numbers are in the order of their bits; 126 is 448, 0 is not a scale.
            shifted = jnp.clip(bits + i + SWEEP[0], 1, 126).astype(jnp.uint8)
            scale = jax.lax.bitcast_convert_type(shifted, jnp.float8_e4m3fn)
            return {"scale": scale, "global_scale": global_scale}

        return Candidates(SWEEP[1] - SWEEP[0] + 1, at, refit=False)

    def sixth(self, w: jax.Array, spec: WeightSpec, top: float) -> tuple[jax.Array, jax.Array]:
        """Absmax / 6 of each group, and the global scale that makes the largest of them ``top``."""
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        whole = jnp.max(largest, axis=(-2, -1), keepdims=True)
        global_scale = exact_arithmetic.quotient(whole, LARGEST_E2M1 * top)
        global_scale = grouping.round_scale(global_scale, "float32")
        return exact_arithmetic.quotient(largest, LARGEST_E2M1), global_scale

    def parameters(self, scale: jax.Array, global_scale: jax.Array) -> Arrays:
        """Scales of groups, global scale included, as they are stored."""
        scale = exact_arithmetic.quotient(scale, global_scale)
        clipped = jnp.clip(scale, 2.0**-9, LARGEST_E4M3)
        return {"scale": clipped.astype(jnp.float8_e4m3fn), "global_scale": global_scale}


MXFP4 = MicroscalingFloat(4, 2)
MXFP8 = MicroscalingFloat(8, 8, "mxfp8e4m3")
NVFP4 = NvidiaFloat4()
