"""RMS normalization."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import ops
from fdq.nn.parameters import value


class RMSNorm(nnx.Module):
    """`y = x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, computed in float32."""

    def __init__(self, features: int, *, epsilon: float = 1e-6, dtype: Any = jnp.float32):
        self.scale: Any = nnx.data(nnx.Param(jnp.ones((features,), dtype)))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., features]` -> the same shape and dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        scale = value(self.scale).astype(jnp.float32)
        return (y * scale.reshape((1,) * (y.ndim - 1) + scale.shape)).astype(x.dtype)

    def lazily(self, x: jax.Array) -> Any:
        """`x [M, features]` as rows that the kernels of a decode step normalize themselves."""
        return ops.normed(x, value(self.scale), self.epsilon)
