"""The router of a mixture-of-experts layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.nn.handing_on import takes_rows
from fdq.nn.linear import initial_kernel
from fdq.nn.parameters import value
from fdq.ops.route.api import route
from fdq.ops.rows import Rows


class Router(nnx.Module):
    """`kernel [H, E]` and optionally `correction_bias [E]`, float32 whatever the model's dtype."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        normalize: bool = True,
        norm_min: float = 0.0,
        correction_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.kernel: Any = nnx.data(initial_kernel(rngs, (hidden_size, num_experts), jnp.float32))
        bias = nnx.Param(jnp.zeros((num_experts,), jnp.float32)) if correction_bias else None
        self.correction_bias: Any = nnx.data(bias)
        self.top_k = top_k
        self.normalize = normalize
        self.norm_min = norm_min

    @takes_rows
    def __call__(self, x: Rows) -> tuple[jax.Array, jax.Array]:
        """`x [T, H]` -> experts [T, top_k] int32 and weights [T, top_k] float32."""
        return route(
            x,
            value(self.kernel),
            value(self.correction_bias),
            top_k=self.top_k,
            normalize=self.normalize,
            norm_min=self.norm_min,
        )
