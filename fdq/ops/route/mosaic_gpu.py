"""`route` by two launches of `pallas_kernels`: the product with its norm, and the choice."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fdq.ops import self_check
from fdq.ops.kernels import Kernel, slower
from fdq.ops.matmul.mosaic_gpu import staged
from fdq.ops.placement import sharded
from fdq.ops.route.scoring import SOFTMAX
from fdq.ops.route.xla import Routing
from fdq.ops.rows import Normed
from pallas_kernels.device import MOST_ROWS, default_device


class MosaicGpu(Kernel[Routing]):
    """XLA takes three launches for the norm, two for the product and five for the choice."""

    def unsupported(self, arguments: Routing) -> str | None:
        """Other scores, rows and experts than the kernels are made for, and sharded arrays."""
        from pallas_kernels.router.routing import supports_router

        if arguments.scoring != SOFTMAX:
            return f"the kernels choose by a softmax over all experts, found {arguments.scoring}"
        x, kernel = arguments.x, arguments.kernel
        if arguments.bias is not None:
            return "no kernel adds a bias to the product"
        hidden, experts = kernel.shape
        if kernel.dtype != jnp.float32 or not supports_router(experts, hidden):
            return f"no kernel routes {kernel.dtype.name} [{hidden}, {experts}]"
        if not 1 <= x.shape[0] <= MOST_ROWS:
            return f"the kernels take 1 to {MOST_ROWS} rows of x, found {x.shape[0]}"
        return sharded(x, kernel)

    def declined(self, arguments: Routing) -> str | None:
        """What is slower than XLA, and what is wrong on this device."""
        experts, top_k = arguments.kernel.shape[1], arguments.top_k
        return slower("router", "float32", 1, experts) or self_check_of(experts, top_k).failure(
            default_device()
        )

    def __call__(self, arguments: Routing) -> tuple[jax.Array, jax.Array]:
        """Experts and weights."""
        from pallas_kernels.router.routing import router_logits, top_k_experts

        a = arguments
        logits, experts = router_logits(staged(a.x), a.kernel), a.kernel.shape[1]
        shared: Any = {"top_k": a.top_k, "normalize": a.normalize, "norm_min": a.norm_min}
        return top_k_experts(logits, a.correction_bias, experts=experts, **shared)


def self_check_of(experts: int, top_k: int) -> self_check.Check:
    """The self-check of both kernels."""
    case = functools.partial(_case, experts, top_k)
    return self_check.Check("router", f"{top_k} of {experts}", case)


def _case(experts: int, top_k: int) -> tuple[Any, Any]:
    """Rows to be normalized, one and eight; experts are chosen by the same logits as theirs."""
    from pallas_kernels.router import routing

    results: list[Any] = []
    wanted: list[Any] = []
    for rows in (1, MOST_ROWS):
        keys = jax.random.split(jax.random.key(rows), 3)
        x = jax.random.normal(keys[0], (rows, 1024), jnp.float32)
        scale = 1 + jax.random.uniform(keys[1], (1024,), jnp.float32)
        kernel = jax.random.normal(keys[2], (1024, experts), jnp.float32)
        normed = staged(Normed(x, scale, 1e-6))
        logits = routing.router_logits(normed, kernel)
        results.append(logits.sum(0)[:, :experts])
        wanted.append(routing.router_logits_reference(normed, kernel)[0])
        chosen: Any = {"experts": experts, "top_k": top_k}
        results.append(routing.top_k_experts(logits, None, **chosen))
        wanted.append(routing.top_k_experts_reference(logits, None, **chosen))
    return results, wanted
