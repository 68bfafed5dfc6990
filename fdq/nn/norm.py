"""RMS normalization."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.nn.parameters import value
from fdq.ops.rows import Normed, Rows


class RMSNorm(nnx.Module):
    """`y = x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, computed in float32."""

    def __init__(self, features: int, *, epsilon: float = 1e-6, dtype: Any = jnp.float32):
        self.scale: Any = nnx.data(nnx.Param(jnp.ones((features,), dtype)))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., features]` -> the same shape and dtype."""
        return Normed(x, value(self.scale), self.epsilon).value()


def normed(norm: Any, x: jax.Array) -> Rows:
    """`norm(x)`, left to whoever reads the rows where `norm` is an `RMSNorm`."""
    if type(norm).__call__ is RMSNorm.__call__:
        return Normed(x, value(norm.scale), norm.epsilon)
    return norm(x)
