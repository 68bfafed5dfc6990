"""Error feedback along the inputs of a weight and, between its columns, along its outputs.

Minimizes `tr(G Dᵀ H D)`, D the change of a weight `[K, N]`, H the second moment of its input and G
that of the loss' gradient at its output: with G what the loss loses, to second order, where both
moments are independent. With `inv(H) = Uᵀ U` and `inv(G) = Vᵀ V`, U and V upper triangular, the
change is `D = Uᵀ E V` and the loss the sum of squares of E, so that a weight in row j and column n
makes up for the errors of all weights in rows up to j and columns up to n. Those with the same
j + n do not depend on each other: a tile of rows and columns is rounded antidiagonal by
antidiagonal, and tiles are made up for in products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats import grouping
from fdq.quantizers import second_moment
from fdq.quantizers.grid import Grid
from fdq.schemes.scheme import WeightSpec

TILE = 64
"""Rows and columns of a tile."""


def rounded(
    w: jax.Array, grid: Grid, inputs: jax.Array, outputs: jax.Array, spec: WeightSpec
) -> jax.Array:
    """The levels `[K, N]` of a weight that is rounded in the order of its rows and columns.

    `inputs` `[K, K]` and `outputs` `[N, N]` are as of `second_moment.feedback_factor`.
    """

    def target(w: jax.Array, made_up: jax.Array, start: jax.Array):
        factor = lax.dynamic_slice_in_dim(inputs, start, TILE, axis=1)
        own = lax.dynamic_slice_in_dim(factor, start, TILE)
        rows = lax.dynamic_slice_in_dim(w, start, TILE) - second_moment.product(factor.T, made_up)
        return rows, own, jnp.diagonal(own)

    shape, inputs, outputs = w.shape, _filled_up(inputs), _filled_up(outputs)
    w, grid = _padded((w, grid), (inputs.shape[0], outputs.shape[0]))
    zeros = jnp.zeros_like(w)
    return _swept(w, grid, outputs, target, zeros, None, spec)[: shape[0], : shape[1]]


def descended(
    w: jax.Array,
    levels: jax.Array,
    grid: Grid,
    moment: jax.Array,
    outputs: jax.Array,
    spec: WeightSpec,
) -> jax.Array:
    """Levels after each row was rounded anew, beside all others, with feedback along its columns.

    `moment` `[K, K]` is that of the inputs, `outputs` as in `rounded`.
    """

    def target(w: jax.Array, left: jax.Array, start: jax.Array):
        rows = lax.dynamic_slice_in_dim(moment, start, TILE)
        own = lax.dynamic_slice_in_dim(rows, start, TILE, axis=1)
        diagonal = jnp.diagonal(own)
        slope = second_moment.product(rows, left) / diagonal[:, None]
        wanted = lax.dynamic_slice_in_dim(w - left, start, TILE) + slope
        return wanted, -own / diagonal[None], jnp.ones(TILE, jnp.float32)

    shape, moment, outputs = w.shape, _filled_up(moment), _filled_up(outputs)
    w, grid = _padded((w, grid), (moment.shape[0], outputs.shape[0]))
    old = grid.value(_padded(levels, w.shape, 0.0))
    return _swept(w, grid, outputs, target, w - old, old, spec)[: shape[0], : shape[1]]


def _swept(
    w: jax.Array,
    grid: Grid,
    outputs: jax.Array,
    target: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]],
    pushed: jax.Array,
    old: jax.Array | None,
    spec: WeightSpec,
) -> jax.Array:
    """Levels, a row of tiles after the other, each from left to right.

    `target` says from what rows before `pushed` down, `E V` or what is left of `w`, which weights
    are wanted in a row of tiles, and how its rows act on each other.
    """
    columns = w.shape[1]

    def row_of_tiles(b: jax.Array, state: tuple[jax.Array, jax.Array]):
        start = b * TILE
        wanted, inputs, diagonal = target(w, state[0], start)
        own_grid = grid.rows(start, TILE)
        own_old = None if old is None else lax.dynamic_slice_in_dim(old, start, TILE)

        def tile(c: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            first = c * TILE
            factor = lax.dynamic_slice_in_dim(outputs, first, TILE, axis=1)
            before = second_moment.product(state[0], factor)
            across = lax.dynamic_slice_in_dim(factor, first, TILE)
            here, its_grid, its_old = jax.tree.map(
                lambda a: lax.dynamic_slice_in_dim(a, first, TILE, axis=1),
                (wanted, own_grid, own_old),
            )
            found = _tile(here, its_grid, its_old, before, inputs, diagonal, across, spec)
            return tuple(
                lax.dynamic_update_slice_in_dim(whole, part, first, axis=1)
                for whole, part in zip(state, found, strict=True)
            )

        zeros = (jnp.zeros((TILE, columns), jnp.float32),) * 3
        found, levels = lax.fori_loop(0, columns // TILE, tile, zeros)[1:]
        if old is not None:
            found = lax.dynamic_slice_in_dim(state[0], start, TILE) + found
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip(state, (found, levels), strict=True)
        )

    return lax.fori_loop(0, w.shape[0] // TILE, row_of_tiles, (pushed, jnp.zeros_like(w)))[1]


def _tile(
    wanted: jax.Array,
    grid: Grid,
    old: jax.Array | None,
    before: jax.Array,
    inputs: jax.Array,
    diagonal: jax.Array,
    outputs: jax.Array,
    spec: WeightSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Errors E, what is pushed down to later rows, and levels of a tile; all `[TILE, TILE]`.

    `wanted` are the weights less what other rows of tiles caused, `before` `E V` of the tiles to
    the left. Pushed down is `E V`, or by how much less than the `old` weights the new ones are. In
    a step, weight r of an antidiagonal is in row `TILE - 1 - r`. What steps found is kept with the
    newest first, so that all of before is a slice.
    """
    steps, width = 2 * TILE - 1, 2 * TILE
    diagonal = diagonal[::-1]
    # By how many steps ago: of the same row in an earlier column, of an earlier row.
    along = jnp.pad(_steps_ago(outputs), ((0, 0), (TILE - 1, TILE - 1)))
    down = _steps_ago(inputs)[:, ::-1]
    across = jnp.pad(jnp.diagonal(outputs), (TILE - 1, TILE - 1), constant_values=1.0)
    wanted, before, old = jax.tree.map(lambda a: _sheared(a, 0.0), (wanted, before, old))
    grid = jax.tree.map(lambda a: _sheared(a, 1.0), grid)
    inside = _sheared(jnp.ones((TILE, TILE), jnp.float32), 0.0)

    def step(t: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        errors, pushed, levels = state
        newest = steps - t  # rows of step t - 1
        mine = lax.dynamic_slice(errors, (newest, 0), (TILE, TILE))
        factor = lax.dynamic_slice(along, (0, t), (TILE, TILE))
        left = before[t] + _total(mine * factor)
        # Of d steps ago, that of d rows above.
        flat = lax.dynamic_slice(pushed, (newest * width + 1,), (TILE * (width + 1),))
        above = _total(flat.reshape(TILE, width + 1)[:, :TILE] * down)
        target = wanted[t] - above - diagonal * left
        row = grid.row(t)
        level = row.level(target, spec)
        value = row.value(level)
        beside = lax.dynamic_slice(across, (t,), (TILE,))
        error = inside[t] * (target - value) / (diagonal * beside)
        found = inside[t] * (left + error * beside if old is None else old[t] - value)
        errors = lax.dynamic_update_slice(errors, error[None], (newest - 1, 0))
        pushed = lax.dynamic_update_slice(pushed, found, ((newest - 1) * width,))
        return errors, pushed, lax.dynamic_update_slice(levels, level[None], (newest - 1, 0))

    history = jnp.zeros((steps + TILE, TILE), jnp.float32)
    flat = jnp.zeros(((steps + TILE + 2) * width,), jnp.float32)
    errors, pushed, levels = lax.fori_loop(0, steps, step, (history, flat, history[:steps]))
    pushed = pushed.reshape(-1, width)[:steps, :TILE]
    return _upright(errors[:steps]), _upright(pushed), _upright(levels)


def _padded(tree: Any, shape: tuple[int, ...], fill: float = 1.0) -> Any:
    """Arrays of one shape, filled up to another."""
    return jax.tree.map(
        lambda a: jnp.pad(
            a,
            [(0, new - now) for new, now in zip(shape, a.shape, strict=True)],
            constant_values=fill,
        ),
        tree,
    )


def _total(x: jax.Array) -> jax.Array:
    """Sums of columns, of pairs first."""
    return grouping.total(x[None])[0]


def _steps_ago(factor: jax.Array) -> jax.Array:
    """`[TILE, TILE]`, upper triangular -> in row d - 1 its entries `[n - d, n]`, n by columns."""
    edge = TILE - 1
    wide = jnp.pad(factor.T[:, ::-1], ((0, 0), (0, TILE + 1)))
    flat = jnp.pad(wide.reshape(-1)[edge:], (0, edge))
    ago = flat[: TILE * 2 * TILE].reshape(TILE, 2 * TILE)[:, :TILE]
    return jnp.pad(ago.T[1:], ((0, 1), (0, 0)))


def _sheared(x: jax.Array, fill: float) -> jax.Array:
    """`[TILE, TILE]` -> by step, weight r of its antidiagonal, `[2 TILE - 1, TILE]`."""
    edge = TILE - 1
    wide = jnp.pad(x[::-1], ((0, 0), (edge, edge)), constant_values=fill)
    width = wide.shape[1]
    flat = jnp.pad(wide.reshape(-1), (0, TILE), constant_values=fill)
    return flat.reshape(TILE, width + 1)[:, : 2 * TILE - 1].T


def _upright(newest_first: jax.Array) -> jax.Array:
    """The inverse of `_sheared`, of steps with the newest first."""
    steps = newest_first.shape[0]
    flat = newest_first[::-1].T.reshape(-1)[TILE - 1 :]
    flat = jnp.pad(flat, (0, max(0, TILE * (steps - 1) - flat.shape[0])))
    return flat[: TILE * (steps - 1)].reshape(TILE, steps - 1)[::-1, :TILE]


def _filled_up(factor: jax.Array) -> jax.Array:
    """With ones on the diagonal up to a multiple of `TILE`."""
    size = factor.shape[0]
    pad = -size % TILE
    ones = jnp.pad(jnp.zeros(size, jnp.float32), (0, pad), constant_values=1.0)
    return jnp.pad(factor, (0, pad)) + jnp.diag(ones)
