"""The feed-forward half of a decoder layer: dense SwiGLU, or a mixture of experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import ops
from fdq.nn.experts import Experts
from fdq.nn.linear import Linear
from fdq.nn.router import Router


class MLP(nnx.Module):
    """SwiGLU: `(silu(x W_gate) * (x W_up)) W_down`, gate and up fused on N in this order."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        use_bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.gate_up_proj = Linear(
            hidden_size, 2 * intermediate_size, use_bias=use_bias, dtype=dtype, rngs=rngs
        )
        self.down_proj = Linear(
            intermediate_size, hidden_size, use_bias=use_bias, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., H]` -> the same shape and dtype."""
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)

    def token(self, x: Any) -> jax.Array:
        """Rows `x [M, H]`, perhaps yet to be normalized -> `[M, H]`, for a decode step."""
        if self.gate_up_proj.bias is not None:
            return self(ops.finished(x))
        rows = ops.gated(self.gate_up_proj.partial_sums(x), x.dtype)
        return self.down_proj.finish(self.down_proj.partial_sums(rows), x.dtype)


class MoE(nnx.Module):
    """Routed experts plus, where the model has them, shared experts as one wider MLP.

    Attributes:
      router: `Router`, or what picks experts as it does.
      experts: `Experts`.
      shared_experts: `MLP`, or None.
    """

    def __init__(self, router: Router, experts: Experts, shared_experts: MLP | None = None):
        self.router = router
        self.experts = experts
        self.shared_experts: Any = nnx.data(shared_experts)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., H]` -> the same shape and dtype."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.experts(rows, *self.router(rows))
        if self.shared_experts is not None:
            y = y + self.shared_experts(rows)
        return y.reshape(x.shape)

    def token(self, x: Any) -> jax.Array:
        """Rows `x [M, H]`, perhaps yet to be normalized -> `[M, H]`, for a decode step."""
        experts, weights = self.router.token(x)
        shared = self.shared_experts
        products = self.experts.token(x, experts, shared)
        if products is None:
            y = self.experts(ops.finished(x), experts, weights)
            return y if shared is None else y + shared.token(x)
        picked, common = products
        y = ops.added_up(picked, weights)
        if common is not None:
            y = y + ops.added_up(common)
        elif shared is not None:
            y = y + shared.token(x).astype(jnp.float32)
        return y.astype(x.dtype)
