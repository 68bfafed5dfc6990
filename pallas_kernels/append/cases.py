"""The shapes that cache append is compiled for ahead of time."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels.aot.kernel_cases import KernelCase, Program, abstract, activation_dtype
from pallas_kernels.append.cache_update import Appended, append
from pallas_kernels.attention.cases import CACHES, abstract_cache


def kernel_cases() -> list[KernelCase]:
    """Append to every kind of cache."""
    return [
        KernelCase(
            name=f"append {cache}, Llama-3-8B, batch {batch}",
            kernel=f"append {cache}",
            build=functools.partial(_append, cache, batch),
            representative=batch == 1,
        )
        for cache in CACHES
        for batch in (1, 8)
    ]


def _append(cache: str, batch: int) -> Program:
    heads, kv_heads, slots, size = 32, 8, 8192, 128
    qkv = abstract((8, batch, (heads + 2 * kv_heads) * size), "float32")  # partial sums
    turn = abstract((batch, size // 2), "float32")
    side = abstract_cache(cache, batch, kv_heads, slots)
    function = functools.partial(_appended, activation_dtype(), heads)
    arguments = (qkv, turn, turn, abstract((batch,), "int32"), (side, side))
    return Program(function, arguments, donate=(4,))


def _appended(dtype, heads, qkv, cos, sin, slots, cache) -> Appended:
    more = {"heads": heads, "interleaved": False, "dtype": jnp.dtype(dtype)}
    return append(qkv, cos, sin, slots, *cache, **more)
