"""GPTQ: rows are rounded one after the other, and those to come make up for the errors so far.

Minimizes `tr(Dᵀ H D)`, D the change of a weight `[K, N]`, H the second moment of its input
(arXiv 2210.17323). Rows are taken in the order of `second_moment.pivot_order`, while groups stay
those of the stored order, with scales of least error weighted by mean squares: what is stored is
decoded as ever. Then rows are gone over again, each set to the best level beside all others
(coordinate descent), and scales are refitted to their codes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats import Arrays, ScaledFormat
from fdq.quantizers import polish, second_moment, two_sided
from fdq.quantizers.grid import Grid, fitted
from fdq.quantizers.quantizer import Quantizer, Statistics, format_of
from fdq.schemes.scheme import WeightSpec

BLOCK = 128
"""Rows whose errors are made up for in one product."""

OUTPUT_DAMPING = 0.1
"""Of the mean square of gradients: the second moment of outputs says less than that of inputs."""


class Gptq(Quantizer):
    """`gptq`: error feedback along the inputs, by their second moment."""

    name = "gptq"
    statistics = ("input_moment",)
    required = ("input_moment",)
    one_at_a_time = True

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Weights of one code each only."""
        del dtype
        able = isinstance(format_of(spec), ScaledFormat)
        return None if able else "is for formats with one code a weight"

    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """Fits scales, rounds with feedback, polishes."""
        w = w.astype(jnp.float32)
        moment = second_moment.damped(statistics["input_moment"])
        parameters = fitted(w, spec, jnp.diagonal(moment))
        # As stored: XLA may leave out a rounding that is followed by a conversion back.
        parameters = lax.optimization_barrier(parameters)
        grid = Grid.of(parameters, spec, w.shape)
        order = second_moment.pivot_order(moment)
        factor = second_moment.feedback_factor(second_moment.in_order(moment, order))
        in_order, its_grid = jax.tree.map(lambda a: a[order], (w, grid))
        levels = rounded(in_order, its_grid, factor, spec)[jnp.argsort(order)]
        parameters, decoded = polish.polished(w, levels, parameters, moment, spec)
        return format_of(spec).encode(decoded, spec, parameters)


def rounded(w: jax.Array, grid: Grid, factor: jax.Array, spec: WeightSpec) -> jax.Array:
    """The levels `[K, N]` of a weight whose rows are rounded in their order, with feedback.

    `factor` is that of `second_moment.feedback_factor`.
    """
    k, n = w.shape
    block = min(BLOCK, k)
    # Rows of zeros that fill up the last block come after all others and change none.
    pad = -k % block
    w = jnp.pad(w, ((0, pad), (0, 0)))
    grid = jax.tree.map(lambda a: jnp.pad(a, ((0, pad), (0, 0)), constant_values=1.0), grid)
    factor = jnp.pad(factor, (0, pad)) + jnp.diag(
        jnp.pad(jnp.zeros(k, jnp.float32), (0, pad), constant_values=1)
    )

    def one_block(b: jax.Array, state: tuple[jax.Array, jax.Array]):
        errors, levels = state
        start = b * block
        columns = lax.dynamic_slice_in_dim(factor, start, block, axis=1)
        target = lax.dynamic_slice_in_dim(w, start, block) - second_moment.product(
            columns.T, errors
        )
        own = lax.dynamic_slice_in_dim(columns, start, block)
        own_grid = grid.rows(start, block)

        def one_row(j: jax.Array, state: tuple[jax.Array, jax.Array]):
            errors, levels = state
            wanted = target[j] - second_moment.product(own[:, j][None], errors)[0]
            row = own_grid.row(j)
            level = row.level(wanted, spec)
            errors = errors.at[j].set((wanted - row.value(level)) / own[j, j])
            return errors, levels.at[j].set(level)

        zeros = jnp.zeros((block, n), jnp.float32)
        own_errors, own_levels = lax.fori_loop(0, block, one_row, (zeros, zeros))
        errors = lax.dynamic_update_slice_in_dim(errors, own_errors, start, axis=0)
        return errors, lax.dynamic_update_slice_in_dim(levels, own_levels, start, axis=0)

    start = (jnp.zeros_like(w), jnp.zeros_like(w))
    return lax.fori_loop(0, (k + pad) // block, one_block, start)[1][:k]


class TwoSidedGptq(Gptq):
    """`gptq2`: feedback along the inputs and along the outputs, by both second moments."""

    name = "gptq2"
    statistics = ("input_moment", "output_moment")
    required = ("input_moment", "output_moment")

    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """As `gptq`, with rows and columns in such an order."""
        w = w.astype(jnp.float32)
        moment = second_moment.damped(statistics["input_moment"])
        outputs = second_moment.damped(statistics["output_moment"], OUTPUT_DAMPING)
        parameters = fitted(w, spec, jnp.diagonal(moment))
        parameters = lax.optimization_barrier(parameters)
        rows, columns = second_moment.pivot_order(moment), second_moment.pivot_order(outputs)
        in_order = second_moment.in_order(moment, rows)
        factor = second_moment.feedback_factor(second_moment.in_order(outputs, columns))

        def permuted[T](a: T) -> T:
            return jax.tree.map(lambda a: a[rows][:, columns], a)

        def restored(a: jax.Array) -> jax.Array:
            return a[jnp.argsort(rows)][:, jnp.argsort(columns)]

        def one_round(_: jax.Array, state: tuple[jax.Array, Arrays]):
            levels, parameters = state
            if polish.can_refit(spec):
                parameters = polish.refitted(w, levels, parameters, moment, spec, outputs)
            grid = Grid.of(parameters, spec, w.shape)
            old = permuted(levels)
            new = two_sided.descended(permuted(w), old, permuted(grid), in_order, factor, spec)
            return restored(new), parameters

        grid = Grid.of(parameters, spec, w.shape)
        inputs = second_moment.feedback_factor(in_order)
        levels = two_sided.rounded(permuted(w), permuted(grid), inputs, factor, spec)
        rounds = polish.rounds(spec)
        start = (restored(levels), parameters)
        levels, parameters = lax.fori_loop(0, rounds, one_round, start)
        decoded = Grid.of(parameters, spec, w.shape).value(levels)
        return format_of(spec).encode(decoded, spec, parameters)


GPTQ, GPTQ2 = Gptq(), TwoSidedGptq()
