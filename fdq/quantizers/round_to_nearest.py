"""Round to nearest: parameters by a closed form, then every weight to its nearest level."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import Arrays, ScaledFormat, distortion, exact_arithmetic, grouping
from fdq.formats.integer import Integer
from fdq.formats.microscaling import HEADROOM_E4M3, NVFP4
from fdq.quantizers.quantizer import Distortion, Quantizer, Statistics, format_of
from fdq.schemes.scheme import WeightSpec


class RoundToNearest(Quantizer):
    """A quantizer whose scales are a formula of the weight (`fit`)."""

    columns_apart = True

    @abc.abstractmethod
    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """The parameters, as stored, of a float32 weight `[..., K, N]`."""

    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """Fits, then encodes."""
        del statistics
        w = w.astype(jnp.float32)
        format, parameters = format_of(spec), self.fit(w, spec)
        if isinstance(format, ScaledFormat):
            parameters = format.finish(parameters, spec)
        return format.encode(w, spec, parameters)

    def expected_distortion(self, spec: WeightSpec, k: int) -> Distortion:
        """Integrated over the extremes of a group."""
        return Distortion(distortion.integral(format_of(spec), spec, self.fit, k), "integral")


class Absmax(RoundToNearest):
    """The largest magnitude of a group is the highest level."""

    name = "absmax"

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Formats that choose scales and codes together have no closed form."""
        del dtype
        return None if format_of(spec).closed_form else "is for formats with a closed form"

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """As the format defines it."""
        return format_of(spec).fit(w, spec)


class SignedMax(RoundToNearest):
    """The weight of largest magnitude, whatever its sign, is the level -2^(b-1) of an integer.

    So the code that `absmax` never uses is used, and the scale carries a sign (llama.cpp's Q4_0).
    """

    name = "signed_max"

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Other levels reach as far up as down, or move with a zero point."""
        del dtype
        able = isinstance(format_of(spec), Integer) and spec.zero_point == "none"
        return None if able else "is for integers without zero points"

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """The scale that puts the extreme weight of each group on the lowest level."""
        format = format_of(spec)
        assert isinstance(format, Integer)
        groups = grouping.to_groups(w, spec)
        high, low = jnp.max(groups, axis=-2), jnp.min(groups, axis=-2)
        extreme = jnp.where(high > -low, high, low)
        return format.with_multiplier({}, exact_arithmetic.quotient(extreme, format.lowest), spec)


class FourOverSix(RoundToNearest):
    """Four over six: the largest magnitude of an NVFP4 group is level 6 or level 4.

    Levels 4 and 6 are far apart, so a group whose largest weights fall between them is better off
    with a larger scale; whichever gives the smaller squared error is taken (arXiv 2512.02010).
    """

    name = "four_over_six"

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Only NVFP4 has e2m1 levels and scales fine enough."""
        del dtype
        return None if spec.format == NVFP4.name else f"is for {NVFP4.name}"

    def fit(self, w: jax.Array, spec: WeightSpec) -> Arrays:
        """Both scales of each group, compared."""
        sixth, global_scale = NVFP4.sixth(w, spec, HEADROOM_E4M3)
        groups = grouping.to_groups(w, spec)
        six = NVFP4.parameters(sixth, global_scale)
        four = NVFP4.parameters(sixth * jnp.float32(1.5), global_scale)
        wins = _error(groups, four, spec) < _error(groups, six, spec)
        scale = jax.lax.select(wins, four["scale"], six["scale"])
        return {"scale": scale, "global_scale": global_scale}

    def expected_distortion(self, spec: WeightSpec, k: int) -> Distortion:
        """Of a sample: which scale wins depends on all weights of a group."""
        return Distortion(distortion.simulated(NVFP4, spec, self.fit, k), "simulated")


def _error(groups: jax.Array, parameters: Arrays, spec: WeightSpec) -> jax.Array:
    u = groups / NVFP4.multiplier(parameters, spec)[..., None, :]
    # In units of the global scale: squares of huge and tiny weights stay in range.
    scale = parameters["scale"].astype(jnp.float32)
    return jnp.sum((u - NVFP4.element.nearest(u)) ** 2, axis=-2) * (scale * scale)


ABSMAX, SIGNED_MAX, FOUR_OVER_SIX = Absmax(), SignedMax(), FourOverSix()
