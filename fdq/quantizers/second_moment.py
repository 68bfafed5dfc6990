"""What quantizers with feedback make of a second moment `[K, K]`: damping, factor, order.

With H the damped moment, `inv(H) = Uᵀ U` and U upper triangular: where row j of a weight is rounded
with an error, what makes up for it in the rows after it is `-error / U[j, j] * U[j, j + 1:]` (GPTQ,
arXiv 2210.17323; the same as LDLQ's feedback, arXiv 2307.13304). All float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

DAMPING = 0.01
"""Of the mean of the diagonal; between 1e-4 and 3e-2 it hardly matters."""

_TIMES = 10.0  # more damping where the factor does not exist
_TRIES = 6
_PIVOTS = 64  # between which the rest of a moment is brought up to date by a product
_LEAST_PIVOT = 1e-12


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A float32 product of matrices, in full precision on every device."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def damped(moment: jax.Array, damping: float = DAMPING) -> jax.Array:
    """`[K, K]`, made symmetric, of mean diagonal 1, with `damping` on its diagonal.

    Channels that never saw anything get the mean of the others; a moment of zeros is the identity.
    """
    moment = 0.5 * (moment + moment.T)
    diagonal = jnp.diagonal(moment)
    alive = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, jnp.float32(1.0))
    added = jnp.where(alive, jnp.float32(damping), jnp.float32(1.0))
    return moment / mean + jnp.diag(added)


def feedback_factor(moment: jax.Array) -> jax.Array:
    """The upper triangular U of `inv(moment) = Uᵀ U`, by one Cholesky factorization.

    Of a moment that rounding left indefinite, the diagonal is raised until it has one.
    """
    k = moment.shape[0]
    identity = jnp.eye(k, dtype=jnp.float32)

    def factor(raised: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky((moment + raised * identity)[::-1, ::-1])

    def fails(state) -> jax.Array:
        tries, _, lower = state
        return (tries < _TRIES) & ~jnp.isfinite(lower).all()

    def again(state):
        tries, raised, _ = state
        raised = raised * _TIMES
        return tries + 1, raised, factor(raised)

    first = (jnp.int32(0), jnp.float32(DAMPING), factor(jnp.float32(0.0)))
    lower = lax.while_loop(fails, again, first)[2]
    inverse = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
    return inverse[::-1, ::-1]


def act_order(moment: jax.Array) -> jax.Array:
    """Channels, int32 `[K]`, of the largest mean square first: rounded while all can make up."""
    return jnp.argsort(-jnp.diagonal(moment), stable=True).astype(jnp.int32)


def pivot_order(moment: jax.Array) -> jax.Array:
    """Channels of a damped moment, int32 `[K]`, so ordered that errors are made up for best.

    What is left of the error of a row once those after it have made up for it, `1 / U[j, j]^2`, is
    its pivot in a Cholesky factorization from the last row to the first. Their product does not
    depend on the order, so that their sum is the smaller the more alike they are: the last row is
    the one of the least pivot, and so on to the first (min-pivot order, arXiv 2507.18553).
    """
    k = moment.shape[0]

    def block(b: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        left, taken, order = state  # what the columns of the factor so far leave of the moment

        def one(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]):
            columns, diagonal, taken, order = state
            pivot = jnp.argmin(jnp.where(taken, jnp.inf, diagonal)).astype(jnp.int32)
            column = left[:, pivot] - product(columns, columns[pivot])
            column = column * lax.rsqrt(jnp.maximum(diagonal[pivot], jnp.float32(_LEAST_PIVOT)))
            column = jnp.where(taken, jnp.float32(0.0), column)
            return (
                columns.at[:, i].set(column),
                diagonal - jnp.square(column),
                taken.at[pivot].set(True),
                order.at[k - 1 - b * _PIVOTS - i].set(pivot),
            )

        columns = jnp.zeros((k, _PIVOTS), jnp.float32)
        start = (columns, jnp.diagonal(left), taken, order)
        count = jnp.minimum(_PIVOTS, k - b * _PIVOTS)
        columns, _, taken, order = lax.fori_loop(0, count, one, start)
        return left - product(columns, columns.T), taken, order

    start = (moment, jnp.zeros(k, bool), jnp.zeros(k, jnp.int32))
    return lax.fori_loop(0, -(-k // _PIVOTS), block, start)[2]


def in_order(moment: jax.Array, order: jax.Array) -> jax.Array:
    """Rows and columns of a moment by `order`."""
    return moment[order][:, order]
