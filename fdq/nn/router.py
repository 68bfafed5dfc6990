"""The router of a mixture-of-experts layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import ops
from fdq.nn.linear import initial_kernel
from fdq.nn.parameters import value
from fdq.ops.explicit_axes import in_auto_axes, spec_entry


def route(
    logits: jax.Array,
    correction_bias: jax.Array | None,
    *,
    top_k: int,
    normalize: bool = True,
    norm_min: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Which experts a token goes to, and with what weights.

    `p = softmax(logits)`; the chosen are the `top_k` largest of `p + correction_bias`; their
    weights are the unbiased `p`, divided by `max(sum, norm_min)` when `normalize` (ERNIE-4.5;
    Qwen3-MoE has no bias).

    Args:
      logits: [T, E] float32.
      correction_bias: [E] float32 or None.
      top_k: experts per token.
      normalize: whether the weights of a token are made to sum to 1.
      norm_min: the least that they are divided by.

    Returns:
      experts [T, top_k] int32, weights [T, top_k] float32.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    scores = probabilities
    if correction_bias is not None:
        scores = probabilities + correction_bias[None, :]
    experts = jax.lax.top_k(scores, top_k)[1]
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    if normalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.maximum(total, norm_min)
    return experts, weights


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

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`x [T, H]` -> experts [T, top_k] int32 and weights [T, top_k] float32."""

        def product(x, kernel):
            highest = jax.lax.Precision.HIGHEST
            return jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=highest)

        # A token's scores are needed together, also where the kernel is sharded over experts.
        logits = in_auto_axes(
            product, x, value(self.kernel), result=lambda: [spec_entry(x, 0), None]
        )
        return route(
            logits,
            value(self.correction_bias),
            top_k=self.top_k,
            normalize=self.normalize,
            norm_min=self.norm_min,
        )

    def token(self, x: Any) -> tuple[jax.Array, jax.Array]:
        """As `__call__`, for the rows of a decode step, which may be yet to be normalized."""
        routed = ops.route_token(
            x,
            value(self.kernel),
            value(self.correction_bias),
            top_k=self.top_k,
            normalize=self.normalize,
            norm_min=self.norm_min,
        )
        return self(ops.finished(x)) if routed is None else routed
