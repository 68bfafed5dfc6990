"""The self-checks that `fdq kernels --check` runs: those that models in published formats ask for.

A model in another format (other groups, other numbers of heads) runs its own when it starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from fdq.cache import CacheTensor, parse_format
from fdq.cache.cache_tensor import sample_scales
from fdq.ops.attention import cudnn
from fdq.ops.attention import mosaic_gpu as attention
from fdq.ops.choice import compute_capability, trace_target
from fdq.ops.grouped_matmul import mosaic_mma as grouped_mma
from fdq.ops.matmul import check_cases, decoded, float8_blocks, mosaic_mma
from fdq.ops.matmul import mosaic_gpu as matmul
from fdq.ops.prepared_weight import WordsWeight, kernel_weight
from fdq.ops.rope_append.mosaic_gpu import Appending
from fdq.ops.route import mosaic_gpu as route
from fdq.ops.self_check import Check
from fdq.quantizers.quantization import quantize

SCHEMES = (
    *("W4A16", "W8A16", "W4A16-g64", "W4A16-g32", "W4A16-asym", "W8A16-g128", "W3A16", "W2A16"),
    *("wint2", "nf4", "wfp8afp8", "block_wise_fp8", "mxfp4", "nvfp4", "mxfp8"),
)
CACHES = ("C16", "C8", "Cfp8", "C4", "C8-kvchannel")
HEADS = ((4, 128), (8, 128), (1, 128), (2, 128), (5, 128), (7, 128), (16, 128), (4, 64), (8, 64))
"""Query heads that share a KV head, and channels of each: the first with every cache, all with
`C16` and `C8`."""

ROUTERS = ((64, 6), (128, 8), (64, 8), (32, 4))  # experts, and how many are picked


def standard_checks() -> Iterator[Check]:
    """For the device that a trace is for."""
    dtype = "bfloat16" if trace_target().has_bfloat16 else "float16"
    for scheme in SCHEMES:
        yield from _of_products(scheme, dtype)
    for cache in CACHES:
        spec = parse_format(cache)
        spec = None if cache == "C16" else spec
        for group, d in HEADS if cache in ("C16", "C8") else HEADS[:1]:
            scales = sample_scales(spec, 1, d)
            side = CacheTensor.empty((1, 1, 64, d), spec, dtype=jnp.dtype(dtype), **scales)
            yield attention.self_check_of(side, group, jnp.dtype(dtype), {})
        yield Appending(spec, dtype).self_check()
        if cache in ("C16", "C8"):
            yield Appending(spec, dtype, norms=True).self_check()
            yield Appending(spec, dtype, bias=True).self_check()
            yield Appending(spec, dtype, interleaved=True).self_check()
    for experts, top_k in ROUTERS:
        yield route.self_check_of(experts, top_k)
    # What libraries multiply, where they do.
    if compute_capability() >= 8.9:
        yield decoded.float8_check("float8_e4m3")
    if compute_capability() >= 8:
        for group, d in HEADS:
            yield cudnn.self_check_of(group, d, jnp.dtype(dtype))


def _of_products(scheme: str, dtype: str) -> Iterator[Check]:
    from pallas_kernels.matmul import float8_blocks as blocks
    from pallas_kernels.matmul import mma
    from pallas_kernels.matmul.integer import has_kernel

    weight = quantize(jax.ShapeDtypeStruct((512, 512), jnp.float32), scheme)
    spec = weight.spec
    if WordsWeight.unsupported(weight) is not None:
        return
    words = jax.eval_shape(lambda: kernel_weight(check_cases.sample(spec)))
    kernels = ["matrix_vector", "gathered_matrix_vector"]
    if has_kernel(words):
        kernels.append("integer_matrix_vector")
    if mma.unsupported(words.layout, dtype) is None:
        kernels.append(mosaic_mma.KERNEL)
        yield grouped_mma.self_check_of(grouped_mma.KERNEL, spec)
    if mma.unsupported(words.layout, "int8") is None:
        kernels.append(mosaic_mma.INTEGERS)
        yield grouped_mma.self_check_of(grouped_mma.INTEGERS, spec)
    for kernel in kernels:
        yield matmul.self_check_of(kernel, spec)
    yield decoded.self_check_of(spec)
    if blocks.unsupported(words.layout) is None:
        yield float8_blocks.check()
