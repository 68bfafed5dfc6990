"""Round to nearest: parameters by a closed form, then every weight to its nearest level."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import Arrays, ScaledFormat, distortion, exact_arithmetic, grouping
from fdq.formats.integer import Integer
from fdq.quantizers.quantizer import Distortion, Quantizer, Statistics, format_of
from fdq.schemes.scheme import WeightSpec


class RoundToNearest(Quantizer):
    """A quantizer whose scales are a formula of the weight (`fit`)."""

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


ABSMAX, SIGNED_MAX = Absmax(), SignedMax()
