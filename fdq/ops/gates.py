"""How the halves of a gated MLP become one: the functions that `fdq.ops.rows.Gated` may be of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Gate = Callable[[jax.Array, jax.Array], jax.Array]
"""`(gate, up) -> rows`, all of one shape and dtype; hashable, as modules hold it."""


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up` (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`gelu(gate) * up`, the GELU by its approximation with tanh (Gemma)."""
    return jax.nn.gelu(gate, approximate=True) * up


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """`(up + 1) * gate * sigmoid(alpha * gate)` of clamped halves (gpt-oss).

    The gate is at most `limit`, up is within `limit` of 0.
    """

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """The rows."""
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * (gate * jax.nn.sigmoid(gate * self.alpha))
