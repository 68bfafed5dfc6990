"""HQQ: offsets of groups chosen without data, by a loss that does not mind a few outliers.

Half-quadratic quantization (https://mobiusml.github.io/hqq_blog) minimizes `|w - w'|^p`, p = 0.7,
over the offset of each group, its scale left at the range of the weights: what is left is shrunk,
`e = sign(d) relu(|d| - |d|^(p - 1) / beta)`, and the offset becomes the mean of `w - e` less the
levels, while beta grows. As published, beta is absolute, meant for weights of about 0.02; a search
(`search`) is the better choice, and this is here to compare with.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats import Arrays, grouping
from fdq.formats.integer import Integer
from fdq.quantizers.quantizer import Quantizer, Statistics, format_of
from fdq.schemes.scheme import WeightSpec

POWER = 0.7
BETA, GROWTH = 10.0, 1.01
ITERATIONS = 20


class Hqq(Quantizer):
    """`hqq`: integers with an offset, as HQQ chooses it."""

    name = "hqq"
    one_at_a_time = True

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Without an offset there is nothing to choose."""
        del dtype
        able = isinstance(format_of(spec), Integer) and spec.zero_point == "offset"
        return None if able else "is for integers with an offset (-affine)"

    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """Shifts the range of each group, then rounds to nearest."""
        del statistics
        format = format_of(spec)
        assert isinstance(format, Integer)
        w = w.astype(jnp.float32)
        parameters = format.fit(w, spec)
        groups = grouping.to_groups(w, spec)
        scale = format.multiplier(parameters, spec)
        first = parameters["offset"].astype(jnp.float32)
        offset = best_offset(groups, scale, first, 2.0**format.bits - 1.0)
        offset = grouping.round_scale(offset, spec.scale_dtype, empty=0.0)
        parameters = {**parameters, "offset": offset.astype(spec.scale_dtype)}
        return format.encode(w, spec, parameters)


def best_offset(
    groups: jax.Array, scale: jax.Array, offset: jax.Array, highest: float
) -> jax.Array:
    """`[..., G, M]`, from the first one, for groups `[..., G, g, M]` and levels 0 to `highest`.

    It goes on while the mean magnitude of what is left becomes less, at most 20 times.
    """

    def left_of(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        above = groups - offset[..., None, :]
        levels = jnp.clip(jnp.round(above / scale[..., None, :]), 0.0, highest)
        values = levels * scale[..., None, :]
        return values, above - values

    def goes_on(state: tuple[jax.Array, ...]) -> jax.Array:
        step, _, _, least, last = state
        return (step < ITERATIONS) & (last < least)

    def iteration(state: tuple[jax.Array, ...]):
        step, beta, offset, _, last = state
        values, left = left_of(offset)
        size = jnp.maximum(jnp.abs(left), jnp.float32(grouping.SMALLEST_NORMAL))
        shrunk = jnp.maximum(size - size ** jnp.float32(POWER - 1.0) / beta, 0.0)
        new = jnp.mean(groups - jnp.sign(left) * shrunk - values, axis=-2)
        found = jnp.mean(jnp.abs(left_of(new)[1]))
        return (
            step + 1,
            beta * jnp.float32(GROWTH),
            jnp.where(found < last, new, offset),
            last,
            found,
        )

    error = jnp.mean(jnp.abs(left_of(offset)[1]))
    start = (jnp.int32(0), jnp.float32(BETA), offset, jnp.float32(jnp.inf), error)
    return lax.while_loop(goes_on, iteration, start)[2]


HQQ = Hqq()
