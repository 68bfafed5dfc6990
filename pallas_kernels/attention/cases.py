"""The shapes that decode attention and cache append are compiled for ahead of time.

One representative case for each kind of cache, and other batches, contexts and groups besides.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot.kernel_cases import (
    KernelCase,
    Program,
    abstract,
    activation_dtype,
    loaded_weights,
)
from pallas_kernels.append.cache_update import append
from pallas_kernels.attention.decode_attention import decode_attention

# Formats of the cache: bytes of an element, and what goes with it.
_CACHES = {"C16": (None, 2.0), "C8": ("int8", 1.0), "Cfp8": ("float8_e4m3", 1.0)}
_CACHES |= {"C4": ("int4", 0.5), "C8 static": ("int8", 1.0)}
_ATTENTION = {  # query heads, heads of the cache, slots, sequences
    "Llama-3-8B": (32, 8, 8192, 1),
    "ERNIE-4.5-21B": (20, 4, 4096, 1),
    "Llama-3-8B, 128k": (32, 8, 131072, 1),
    "Llama-3-8B, batch 64": (32, 8, 4096, 64),
    "as many heads as the cache": (8, 8, 8192, 1),
    "Qwen3-235B-A22B": (64, 4, 8192, 1),
}


def kernel_cases() -> list[KernelCase]:
    """Attention and append."""
    return [*_attention_cases(), *_append_cases()]


def _attention_cases() -> list[KernelCase]:
    return [
        KernelCase(
            name=f"attention {cache}, {model}",
            kernel=f"attention {cache}",
            build=functools.partial(_attention, cache, *shape),
            representative=index == 0,
            weights_per_iteration=loaded_weights(_CACHES[cache][1]),
            bytes_per_weight=_CACHES[cache][1],
            report="decode_attention",
        )
        for cache in _CACHES
        for index, (model, shape) in enumerate(_ATTENTION.items())
        if index == 0 or cache in ("C8", "C4") or model.startswith("Qwen3")
    ]


def _attention(cache: str, heads: int, kv_heads: int, slots: int, batch: int) -> Program:
    q = abstract((batch, heads, 128), activation_dtype())
    arrays = _cache(cache, batch, kv_heads, slots)
    lengths = abstract((batch,), "int32")
    function = functools.partial(_attend, _CACHES[cache][0])
    return Program(function=function, arguments=(q, lengths, arrays))


def _attend(cache_format: str | None, q: Any, lengths: Any, arrays: dict[str, Any]) -> jax.Array:
    return decode_attention(q, lengths=lengths, cache_format=cache_format, **arrays)


def _append_cases() -> list[KernelCase]:
    return [
        KernelCase(
            name=f"append {cache}, Llama-3-8B, batch {batch}",
            kernel=f"append {cache}",
            build=functools.partial(_append, cache, batch),
            representative=batch == 1,
        )
        for cache in _CACHES
        for batch in (1, 8)
    ]


def _append(cache: str, batch: int) -> Program:
    heads, kv_heads, slots, size = 32, 8, 8192, 128
    qkv = abstract((8, batch, (heads + 2 * kv_heads) * size), "float32")  # partial sums
    turn = abstract((batch, size // 2), "float32")
    function = functools.partial(_appended, _CACHES[cache][0], activation_dtype(), heads)
    return Program(
        function=function,
        arguments=(
            qkv,
            turn,
            turn,
            abstract((batch,), "int32"),
            _cache(cache, batch, kv_heads, slots),
        ),
        donate=(4,),
    )


def _appended(
    cache_format: str | None, dtype: str, heads: int, qkv: Any, cos: Any, sin: Any, slots: Any,
    arrays: dict[str, Any],
) -> Any:  # fmt: skip
    return append(
        qkv,
        cos,
        sin,
        slots,
        **arrays,
        heads=heads,
        interleaved=False,
        cache_format=cache_format,
        dtype=jnp.dtype(dtype),
    )


def _cache(cache: str, batch: int, kv_heads: int, slots: int) -> dict[str, jax.ShapeDtypeStruct]:
    cache_format, _ = _CACHES[cache]
    dtype = {None: activation_dtype(), "int8": "int8"}.get(cache_format, "uint8")
    width = 64 if cache_format == "int4" else 128
    codes = abstract((batch, kv_heads, slots, width), dtype)
    arrays = {"k": codes, "v": codes}
    if cache_format is not None:
        static = cache.endswith("static")
        shape = (kv_heads, 128) if static else (batch, kv_heads, slots)
        arrays |= dict.fromkeys(("k_scale", "v_scale"), abstract(shape, "float32"))
        if cache_format == "int4":
            arrays |= dict.fromkeys(("k_zero", "v_zero"), abstract(shape, "uint8"))
    return arrays
