"""The experts of a mixture-of-experts layer: one kernel for all of them, one picked per row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import ops
from fdq.nn.linear import initial_kernel
from fdq.nn.parameters import value
from fdq.schemes.scheme import ActivationSpec


class ExpertLinear(nnx.Module):
    """`y[t] = x[t] @ kernel[expert_index[t]]` with `kernel [E, K, N]`.

    Attributes:
      kernel: `nnx.Param` of `[E, K, N]`, or a QTensor that stands for it.
      activation, activation_scale: as in `Linear`; one scale serves all experts.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (num_experts, in_features, out_features)
        self.kernel: Any = nnx.data(initial_kernel(rngs, shape, dtype))
        self.activation: ActivationSpec | None = None
        self.activation_scale: Any = nnx.data(None)

    def __call__(self, x: jax.Array, expert_index: jax.Array) -> jax.Array:
        """`x [T, K]`, `expert_index [T] int32 -> [T, N]` in the dtype of `x`."""
        return ops.grouped_matmul(
            x,
            value(self.kernel),
            expert_index,
            activation=self.activation,
            activation_scale=value(self.activation_scale),
        )


class Experts(nnx.Module):
    """SwiGLU experts: `gate_up_proj [E, H, 2 I]` (gate first) and `down_proj [E, I, H]`."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.gate_up_proj = ExpertLinear(
            num_experts, hidden_size, 2 * intermediate_size, dtype=dtype, rngs=rngs
        )
        self.down_proj = ExpertLinear(
            num_experts, intermediate_size, hidden_size, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """Sum over the chosen experts of weight times output.

        Args:
          x: [T, H].
          experts: [T, top_k] int32.
          weights: [T, top_k] float32.

        Returns:
          [T, H] in the dtype of `x`, summed in float32.
        """
        tokens, top_k = experts.shape
        rows = jnp.repeat(x, top_k, axis=0, total_repeat_length=tokens * top_k)
        index = experts.reshape(-1)
        gate, up = jnp.split(self.gate_up_proj(rows, index), 2, axis=-1)
        y = self.down_proj(jax.nn.silu(gate) * up, index)
        y = y.reshape(tokens, top_k, -1).astype(jnp.float32)
        return (y * weights[..., None]).sum(axis=1).astype(x.dtype)

    def token(
        self, x: Any, experts: jax.Array, shared: Any = None
    ) -> tuple[jax.Array, jax.Array | None] | None:
        """The products of a decode step, see `fdq.ops.expert_products`.

        Args:
          x: rows [T, H], perhaps yet to be normalized.
          experts: [T, top_k] int32.
          shared: the `MLP` of the shared experts, to come along in the same launches.

        Returns:
          float32 [split, T, top_k, H] of the picks and [split, T, H] of the shared experts, None
          for these where they are to run by themselves; None where XLA is to do it all.
        """
        own = (self.gate_up_proj, self.down_proj)
        if any(layer.activation is not None for layer in own):
            return None
        gate_up, down = (value(layer.kernel) for layer in own)
        if shared is not None:
            others = (shared.gate_up_proj, shared.down_proj)
            if all(layer.activation is None and layer.bias is None for layer in others):
                pair = tuple(value(layer.kernel) for layer in others)
                joined = ops.expert_products(x, experts, gate_up, down, pair)
                if joined is not None:
                    return joined
        return ops.expert_products(x, experts, gate_up, down)
