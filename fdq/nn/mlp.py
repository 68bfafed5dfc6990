"""The feed-forward half of a decoder layer: dense SwiGLU, or a mixture of experts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.nn.experts import Experts
from fdq.nn.handing_on import hand_on, reads_rows, sums_of, takes_rows
from fdq.nn.linear import Linear, initial_kernel
from fdq.nn.parameters import value
from fdq.ops.gates import Gate, swiglu
from fdq.ops.route.api import route
from fdq.ops.route.scoring import SOFTMAX, Scoring
from fdq.ops.rows import Gated, Rows, flattened


class MLP(nnx.Module):
    """`gate(x W_gate, x W_up) W_down`, by default SwiGLU; both fused on N in this order."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        use_bias: bool = False,
        gate: Gate = swiglu,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.gate_up_proj = Linear(
            hidden_size, 2 * intermediate_size, use_bias=use_bias, dtype=dtype, rngs=rngs
        )
        self.down_proj = Linear(
            intermediate_size, hidden_size, use_bias=use_bias, dtype=dtype, rngs=rngs
        )
        self.intermediate_size = intermediate_size
        self.gate = gate

    def fused_parts(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """As `Attention.fused_parts`: gate and up, by columns."""
        return {"gate_up_proj": ((self.intermediate_size,) * 2, 1)}

    @takes_rows
    def __call__(self, x: Rows) -> jax.Array:
        """`x [..., H]` -> the same shape and dtype."""
        with jax.named_scope("gate_up_proj"):
            rows = Gated(sums_of(self.gate_up_proj, x), self.gate)
        with jax.named_scope("down_proj"):
            return hand_on(self.down_proj, rows)


class Router(nnx.Module):
    """`kernel [H, E]`, and optionally `bias [E]` and `correction_bias [E]`: see `route`.

    All float32 whatever the model's dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        normalize: bool = True,
        norm_min: float = 0.0,
        correction_bias: bool = False,
        scoring: Scoring = SOFTMAX,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        scoring.check(num_experts, top_k)

        def zeros(wanted: bool) -> Any:
            return nnx.data(nnx.Param(jnp.zeros((num_experts,), jnp.float32)) if wanted else None)

        self.kernel: Any = nnx.data(initial_kernel(rngs, (hidden_size, num_experts), jnp.float32))
        self.bias: Any = zeros(use_bias)
        self.correction_bias: Any = zeros(correction_bias)
        self.top_k = top_k
        self.normalize = normalize
        self.norm_min = norm_min
        self.scoring = scoring

    @takes_rows
    def __call__(self, x: Rows) -> tuple[jax.Array, jax.Array]:
        """`x [T, H]` -> experts [T, top_k] int32 and weights [T, top_k] float32."""
        return route(
            x,
            value(self.kernel),
            value(self.correction_bias),
            bias=value(self.bias),
            top_k=self.top_k,
            normalize=self.normalize,
            norm_min=self.norm_min,
            scoring=self.scoring,
        )


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

    @takes_rows
    def __call__(self, x: Rows) -> jax.Array:
        """`x [..., H]` -> the same shape and dtype."""
        rows, shared = flattened(x), self.shared_experts
        with jax.named_scope("router"):
            routed = hand_on(self.router, rows)
        together = isinstance(shared, MLP) and reads_rows(shared) and reads_rows(self.experts)
        with jax.named_scope("experts"):
            if together:
                y = self.experts(rows, *routed, shared=shared)
            else:
                y = hand_on(self.experts, rows, *routed)
        if shared is not None and not together:
            with jax.named_scope("shared_experts"):
                y = y + hand_on(shared, rows)
        return y.reshape(x.shape)
