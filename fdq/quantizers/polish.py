"""Codes and scales made better beside each other: the least `tr(Dᵀ H D)` that single steps reach.

D is the change of a weight `[K, N]`, H `[K, K]`. Neither step makes it larger.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats import Arrays, ScaledFormat
from fdq.quantizers import second_moment
from fdq.quantizers.grid import Grid
from fdq.quantizers.quantizer import format_of
from fdq.schemes.scheme import WeightSpec

BLOCK = 128
ROUNDS = {2: 4, 3: 3}  # by bits


ITERATIONS = 6  # of conjugate gradients


def polished(
    w: jax.Array, levels: jax.Array, parameters: Arrays, moment: jax.Array, spec: WeightSpec
) -> tuple[Arrays, jax.Array]:
    """Parameters, and the weight that levels and parameters stand for, both `[K, N]` float32."""

    def one_round(_: jax.Array, state: tuple[jax.Array, Arrays]):
        levels, parameters = state
        if can_refit(spec):
            parameters = refitted(w, levels, parameters, moment, spec)
        grid = Grid.of(parameters, spec, w.shape)
        return descended(w, levels, grid, moment, spec), parameters

    levels, parameters = lax.fori_loop(0, rounds(spec), one_round, (levels, parameters))
    return parameters, Grid.of(parameters, spec, w.shape).value(levels)


def rounds(spec: WeightSpec) -> int:
    """How often codes and scales are gone over: few levels gain more by it."""
    return ROUNDS.get(format_of(spec).bits, 1)


def can_refit(spec: WeightSpec) -> bool:
    """Whether scales are free: not powers of two or e4m3, nor codes themselves, nor of columns."""
    format = format_of(spec)
    free = not format.fixed and not spec.double_quantization
    return (
        free and spec.granularity in ("group", "channel") and spec.scale_dtype != "float8_e8m0fnu"
    )


def descended(
    w: jax.Array, levels: jax.Array, grid: Grid, moment: jax.Array, spec: WeightSpec
) -> jax.Array:
    """Levels after one round of coordinate descent: each row the best beside all others."""
    k, n = w.shape
    block = min(BLOCK, k)
    pad = -k % block
    rows = ((0, pad), (0, 0))
    w, levels = jnp.pad(w, rows), jnp.pad(levels, rows)
    grid = jax.tree.map(lambda a: jnp.pad(a, rows, constant_values=1.0), grid)
    added = jnp.diag(jnp.pad(jnp.zeros(k, jnp.float32), (0, pad), constant_values=1.0))
    moment = jnp.pad(moment, (0, pad)) + added

    def one_block(b: jax.Array, state: tuple[jax.Array, jax.Array]):
        left, levels = state  # what is left of w
        start = b * block
        own = lax.dynamic_slice_in_dim(moment, start, block)
        slope = second_moment.product(own, left)
        own = lax.dynamic_slice_in_dim(own, start, block, axis=1)
        own_grid = grid.rows(start, block)
        own_levels = lax.dynamic_slice_in_dim(levels, start, block)

        def one_row(j: jax.Array, state: tuple[jax.Array, jax.Array]):
            moved, levels = state
            row = own_grid.row(j)
            value = row.value(levels[j])
            rest = slope[j] - second_moment.product(own[j][None], moved)[0]
            level = row.level(value + rest / own[j, j], spec)
            moved = moved.at[j].set(row.value(level) - value)
            return moved, levels.at[j].set(level)

        zeros = jnp.zeros((block, n), jnp.float32)
        moved, own_levels = lax.fori_loop(0, block, one_row, (zeros, own_levels))
        own_left = lax.dynamic_slice_in_dim(left, start, block) - moved
        left = lax.dynamic_update_slice_in_dim(left, own_left, start, axis=0)
        return left, lax.dynamic_update_slice_in_dim(levels, own_levels, start, axis=0)

    start = (w - grid.value(levels), levels)
    return lax.fori_loop(0, (k + pad) // block, one_block, start)[1][:k]


def refitted(
    w: jax.Array,
    levels: jax.Array,
    parameters: Arrays,
    moment: jax.Array,
    spec: WeightSpec,
    outputs: jax.Array | None = None,
) -> Arrays:
    """Parameters with the scales, as stored, that are best for the levels, group by group.

    Of `tr(Dᵀ H D)` each column's by itself; with the second moment of `outputs`, `[N, N]`, of
    `tr(G Dᵀ H D)`, all columns of a group together (conjugate gradients).
    """
    format = format_of(spec)
    assert isinstance(format, ScaledFormat)
    k = w.shape[0]
    size = spec.group_size or k
    left = w - Grid.of(parameters, spec, w.shape).value(levels)

    def across(x: jax.Array) -> jax.Array:
        return x if outputs is None else second_moment.product(x, outputs)

    def one_group(i: jax.Array, state: tuple[jax.Array, Arrays]):
        left, parameters = state
        own_rows = lax.dynamic_slice_in_dim(moment, i * size, size)
        own = lax.dynamic_slice_in_dim(own_rows, i * size, size, axis=1)
        level = lax.dynamic_slice_in_dim(levels, i * size, size)
        slope = jnp.sum(level * across(second_moment.product(own_rows, left)), axis=0)
        own_curvature = jnp.sum(level * second_moment.product(own, level), axis=0)

        def curved(step: jax.Array) -> jax.Array:
            if outputs is None:
                return own_curvature * step
            return jnp.sum(level * across(second_moment.product(own, level * step[None])), axis=0)

        diagonal = own_curvature if outputs is None else own_curvature * jnp.diagonal(outputs)
        inverse = jnp.where(diagonal > 0, 1.0 / diagonal, 0.0)
        wanted = inverse * slope
        if outputs is not None:
            wanted = _solved(curved, slope, inverse)
        one = {name: lax.dynamic_slice_in_dim(a, i, 1) for name, a in parameters.items()}
        scale = format.multiplier(one, spec)
        other = lax.optimization_barrier(format.with_multiplier(one, scale + wanted[None], spec))
        step = (format.multiplier(other, spec) - scale)[0]
        gain = step * (2.0 * slope - curved(step))
        better = gain > 0 if outputs is None else jnp.broadcast_to(jnp.sum(gain) > 0, gain.shape)
        step = jnp.where(better, step, 0.0)
        kept = {name: jnp.where(better[None], a, one[name]) for name, a in other.items()}
        parameters = {
            name: lax.dynamic_update_slice_in_dim(a, kept[name], i, axis=0)
            for name, a in parameters.items()
        }
        own_left = lax.dynamic_slice_in_dim(left, i * size, size) - step[None] * level
        return lax.dynamic_update_slice_in_dim(left, own_left, i * size, axis=0), parameters

    return lax.fori_loop(0, k // size, one_group, (left, parameters))[1]


def _solved(curved: Callable[[jax.Array], jax.Array], slope: jax.Array, inverse: jax.Array):
    """Where a quadratic form of this slope is least, nearly; `inverse` is that of its diagonal."""

    def iteration(_: jax.Array, state: tuple[jax.Array, ...]):
        x, rest, direction, size = state
        image = curved(direction)
        bend = jnp.vdot(direction, image)
        step = jnp.where(bend > 0, size / bend, 0.0)
        x, rest = x + step * direction, rest - step * image
        scaled = inverse * rest
        new = jnp.vdot(rest, scaled)
        direction = scaled + jnp.where(size > 0, new / size, 0.0) * direction
        return x, rest, direction, new

    scaled = inverse * slope
    state = (jnp.zeros_like(slope), slope, scaled, jnp.vdot(slope, scaled))
    return lax.fori_loop(0, ITERATIONS, iteration, state)[0]
