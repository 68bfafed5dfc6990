"""`route` by two launches of `pallas_kernels`: the product with its norm, and the choice."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.ops import self_check
from fdq.ops.kernels import Kernel, slower
from fdq.ops.matmul.mosaic_gpu import staged
from fdq.ops.placement import sharded
from fdq.ops.route.scoring import SOFTMAX
from fdq.ops.route.xla import Routing
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
        return slower("router", "float32", 1, experts) or check(experts, top_k, default_device())

    def __call__(self, arguments: Routing) -> tuple[jax.Array, jax.Array]:
        """Experts and weights."""
        from pallas_kernels.router.routing import router_logits, top_k_experts

        a = arguments
        logits, experts = router_logits(staged(a.x), a.kernel), a.kernel.shape[1]
        shared: Any = {"top_k": a.top_k, "normalize": a.normalize, "norm_min": a.norm_min}
        return top_k_experts(logits, a.correction_bias, experts=experts, **shared)


def check(experts: int, top_k: int, device: Any) -> str | None:
    """Why the kernels are switched off on a device."""

    def case():
        from pallas_kernels.router import routing

        keys = jax.random.split(jax.random.key(4), 2)
        x = jax.random.normal(keys[0], (2, 256), jnp.float32)
        kernel = jax.random.normal(keys[1], (256, experts), jnp.float32)
        logits = routing.router_logits(x, kernel)
        wanted = routing.router_logits_reference(x, kernel)
        chosen = routing.top_k_experts(logits, None, experts=experts, top_k=top_k)
        wanted_chosen = routing.top_k_experts_reference(wanted, None, experts=experts, top_k=top_k)
        return (logits.sum(0)[:, :experts], chosen), (wanted[0], wanted_chosen)

    return self_check.failure("router", f"{top_k} of {experts}", device, case)
