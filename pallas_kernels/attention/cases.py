"""The shapes that decode attention is compiled for ahead of time."""

from __future__ import annotations

import functools
from typing import Any

import jax

from pallas_kernels.aot.kernel_cases import (
    KernelCase,
    Program,
    abstract,
    activation_dtype,
    loaded_weights,
)
from pallas_kernels.attention.decode_attention import decode_attention
from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.cache.formats import CACHE_WORDS

# Formats of the cache, and bytes of an element.
CACHES = {
    "C16": (None, 2.0),
    "C8": ("int8", 1.0),
    "Cfp8": ("float8_e4m3", 1.0),
    "C4": ("int4", 0.5),
    "C8 static": ("int8", 1.0),
}
_ATTENTION = {  # query heads, heads of the cache, slots, sequences
    "Llama-3-8B": (32, 8, 8192, 1),
    "ERNIE-4.5-21B": (20, 4, 4096, 1),
    "Llama-3-8B, 128k": (32, 8, 131072, 1),
    "Llama-3-8B, batch 64": (32, 8, 4096, 64),
    "as many heads as the cache": (8, 8, 8192, 1),
    "Qwen3-235B-A22B": (64, 4, 8192, 1),
}


def kernel_cases() -> list[KernelCase]:
    """Decode attention over every kind of cache."""
    return [
        KernelCase(
            name=f"attention {cache}, {model}",
            kernel=f"attention {cache}",
            build=functools.partial(_attention, cache, *shape),
            representative=index == 0,
            weights_per_iteration=functools.partial(loaded_weights, CACHES[cache][1]),
            bytes_per_weight=CACHES[cache][1],
            report="decode_attention",
        )
        for cache in CACHES
        for index, (model, shape) in enumerate(_ATTENTION.items())
        if index == 0 or cache in ("C8", "C4") or model.startswith("Qwen3")
    ]


def _attention(cache: str, heads: int, kv_heads: int, slots: int, batch: int) -> Program:
    q = abstract((batch, heads, 128), activation_dtype())
    side = abstract_cache(cache, batch, kv_heads, slots)
    return Program(_attend, (q, abstract((batch,), "int32"), side, side))


def _attend(q: Any, lengths: Any, k: CacheArrays, v: CacheArrays) -> jax.Array:
    return decode_attention(q, k, v, lengths=lengths)


def abstract_cache(cache: str, batch: int, kv_heads: int, slots: int) -> CacheArrays:
    """Keys or values of head_dim 128 in one of `CACHES`, without numbers."""
    cache_format, _ = CACHES[cache]
    words = CACHE_WORDS[cache_format]
    dtype = activation_dtype() if cache_format is None else words.dtypes[0]
    codes = abstract((batch, kv_heads, slots, 128 // words.packed), dtype)
    shape = (kv_heads, 128) if cache.endswith("static") else (batch, kv_heads, slots)
    scale = None if cache_format is None else abstract(shape, "float32")
    zero = abstract(shape, "uint8") if words.has_zero else None
    return CacheArrays(codes, scale, zero, cache_format)
