"""Small floats with a small float as the scale of a short group: MXFP4, MXFP8 and NVFP4.

=========  ===========  =====  ==========================  ==================================
format     codes        group  scale                       value
=========  ===========  =====  ==========================  ==================================
`mxfp4`    e2m1 packed  32     e8m0, a power of two        level * scale
`mxfp8`    float8_e4m3  32     e8m0, a power of two        level * scale
`nvfp4`    e2m1 packed  16     e4m3 times a float32 of     level * scale * global_scale
                               the matrix
=========  ===========  =====  ==========================  ==================================

Sources: OCP Microscaling Formats 1.0 (section 6.3 for the exponent: `floor(log2(absmax)) - 2` for
e2m1, which saturates); NVIDIA's NVFP4 (`global_scale = absmax / (6 * 448)`); four-over-six, arXiv
2512.02010.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fdq.formats import exact_arithmetic, grouping, small_float
from fdq.formats.format import Arrays, Candidates
from fdq.formats.small_float import FloatLevels
from fdq.schemes.scheme import WeightSpec

# Largest block scale when scales may be raised above absmax / 6 (to absmax / 4 and a bit more).
HEADROOM_E4M3 = 256.0
# e4m3 numbers, as steps in their bits, around absmax / 6 that the search of nvfp4 tries: 8 steps
# are a factor of 2.
SWEEP = (-6, 7)


class MicroscalingFloat(FloatLevels):
    """MXFP4 and MXFP8: the scale is a power of two."""

    group_size = 32
    scale_dtypes = ("float8_e8m0fnu",)
    fixed = True
    searchable = True

    def __init__(self, element: small_float.Float4 | small_float.Float8, *synonyms: str):
        super().__init__(element)
        self.name, self.grammar_name = f"mxfp{element.bits}", f"MXFP{element.bits}"
        self.synonyms, self.aliases = synonyms, (self.name,)
        self.largest_exponent = math.floor(math.log2(element.largest))

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


class NvidiaFloat4(FloatLevels):
    """NVFP4: e4m3 scales of 16 rows, and one float32 for the matrix."""

    name = "nvfp4"
    grammar_name = "NVFP4"
    aliases = ("nvfp4", "modelopt_fp4")
    group_size = 16
    scale_dtypes = ("float8_e4m3fn",)
    fixed = True
    searchable = True

    def reach(self, spec: WeightSpec) -> float:
        """How often the global scale, with both of the codes and of their scales the largest."""
        return self.element.largest * small_float.E4M3.largest

    def array_names(self, spec: WeightSpec) -> tuple[str, ...]:
        """`global_scale` `[..., 1, 1]` float32 multiplies the whole matrix."""
        return ("codes", "scale", "global_scale")

    def multiplier(self, parameters: Arrays, spec: WeightSpec) -> jax.Array:
        """Block scale times global scale."""
        # XLA's own conversion is a slow sequence of selects.
        bits = jax.lax.bitcast_convert_type(parameters["scale"], jnp.uint8)
        scale = small_float.E4M3.from_bits(bits) * jnp.float32(small_float.E4M3.factor)
        return scale * parameters["global_scale"]

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """The largest magnitude of a group is level 6."""
        sixth, global_scale = self.sixth(w, spec, small_float.E4M3.largest)
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
        """Absmax / 6 of each group, and the global scale that makes the largest of them `top`."""
        largest = grouping.absolute_maximum(grouping.to_groups(w, spec))
        whole = jnp.max(largest, axis=(-2, -1), keepdims=True)
        global_scale = exact_arithmetic.quotient(whole, small_float.E2M1.largest * top)
        global_scale = grouping.round_scale(global_scale, "float32")
        return exact_arithmetic.quotient(largest, small_float.E2M1.largest), global_scale

    def parameters(self, scale: jax.Array, global_scale: jax.Array) -> Arrays:
        """Scales of groups, global scale included, as they are stored."""
        scale = exact_arithmetic.quotient(scale, global_scale)
        clipped = jnp.clip(scale, 2.0**-9, small_float.E4M3.largest)
        return {"scale": clipped.astype(jnp.float8_e4m3fn), "global_scale": global_scale}


MXFP4 = MicroscalingFloat(small_float.E2M1)
MXFP8 = MicroscalingFloat(small_float.E4M3, "mxfp8e4m3")
NVFP4 = NvidiaFloat4(small_float.E2M1)
