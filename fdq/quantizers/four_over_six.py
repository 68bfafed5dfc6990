"""Four over six: the largest magnitude of an NVFP4 group is level 6 or level 4.

Levels 4 and 6 are far apart, so a group whose largest weights fall between them is better off with
a larger scale; whichever gives the smaller squared error is taken (arXiv 2512.02010).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import Arrays, distortion, grouping
from fdq.formats.microscaling import HEADROOM_E4M3, NVFP4
from fdq.quantizers.quantizer import Distortion
from fdq.quantizers.round_to_nearest import RoundToNearest
from fdq.schemes.scheme import WeightSpec


class FourOverSix(RoundToNearest):
    """The better of two scales a group."""

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


FOUR_OVER_SIX = FourOverSix()
