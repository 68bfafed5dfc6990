"""The shapes that the router's kernels are compiled for ahead of time."""

from __future__ import annotations

import functools

from pallas_kernels.aot.kernel_cases import KernelCase, Program, abstract, activation_dtype
from pallas_kernels.matmul.row_sources import Normed
from pallas_kernels.router.routing import router_logits, top_k_experts


def kernel_cases() -> list[KernelCase]:
    """The router of ERNIE-4.5-21B-A3B (64 experts, 6 of them) for one token."""

    def logits() -> Program:
        dtype = activation_dtype()
        rows = Normed(abstract((1, 2560), dtype), abstract((2560,), dtype), 1e-6)
        return Program(router_logits, (rows, abstract((2560, 64), "float32")))

    def experts() -> Program:
        function = functools.partial(top_k_experts, experts=64, top_k=6, norm_min=1e-12)
        return Program(function, (abstract((8, 1, 128), "float32"), abstract((64,), "float32")))

    case = functools.partial(KernelCase, representative=True)
    return [
        case(name="router, 1 x 2560 x 64", kernel="router", build=logits),
        case(name="top-k experts, 6 of 64", kernel="top-k experts", build=experts),
    ]
