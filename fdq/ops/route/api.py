"""`route`: the product of a router, and the experts and weights that it chooses."""

from __future__ import annotations

import jax

from fdq.ops.implementation import Op
from fdq.ops.route.mosaic_gpu import MosaicGpu
from fdq.ops.route.scoring import SOFTMAX, Scoring
from fdq.ops.route.xla import Routing, Xla
from fdq.ops.rows import Rows
from pallas_kernels.typing import Array, Float, Int

ROUTE: Op[Routing] = Op("route", MosaicGpu(), Xla())
"""Implementations return experts int32 `[T, top_k]` and weights float32 `[T, top_k]`."""


def route(
    x: Rows,
    kernel: Float[Array, "k e"],
    correction_bias: Float[Array, " e"] | None = None,
    *,
    top_k: int,
    normalize: bool = True,
    norm_min: float = 0.0,
    bias: Float[Array, " e"] | None = None,
    scoring: Scoring = SOFTMAX,
    implementation: str | None = None,
) -> tuple[Int[Array, "*t top"], Float[Array, "*t top"]]:
    """Which experts a token goes to, and with what weights.

    `p = softmax(x @ kernel + bias)`; the chosen are the `top_k` largest of `p + correction_bias`;
    their weights are `p` without that, divided by `max(sum, norm_min)` when `normalize` (ERNIE-4.5;
    Qwen3-MoE has no bias; gpt-oss has `bias`, and its softmax over the chosen logits is `p` divided
    by its sum). With another `scoring` (DeepSeek, GLM) p is that, the chosen are those of the best
    groups, and weights are scaled at last. All of it is computed in float32.

    Args:
      x: `[T, H]`.
      kernel: `[H, E]`.
      correction_bias: float32 `[E]` or None.
      top_k: experts per token.
      normalize: whether the weights of a token are made to sum to 1.
      norm_min: the least that they are divided by.
      bias: float `[E]` of the product, or None.
      scoring: another p than a softmax, groups of experts, a factor of the weights.
      implementation: as in `fdq.matmul`.

    Returns:
      experts `[T, top_k]` int32, weights `[T, top_k]` float32.

    Raises:
      ValueError: experts that do not fall into the groups of `scoring`.
    """
    scoring.check(kernel.shape[1], top_k)
    arguments = Routing(x, kernel, correction_bias, top_k, normalize, norm_min, scoring, bias)
    with jax.named_scope("route"):
        return ROUTE.choose(arguments, implementation)(arguments)
