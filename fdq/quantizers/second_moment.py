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


def in_order(moment: jax.Array, order: jax.Array) -> jax.Array:
    """Rows and columns of a moment by `order`."""
    return moment[order][:, order]
