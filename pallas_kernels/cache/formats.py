"""Every cache format that kernels read and write, and what a pair of caches is."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.cache.float8 import Float8Words
from pallas_kernels.cache.floats import FloatWords
from pallas_kernels.cache.int4 import Int4Words
from pallas_kernels.cache.int8 import Int8Words
from pallas_kernels.cache.words import HEAD_DIMS, CacheWords

CACHE_WORDS: dict[str | None, type[CacheWords]] = {
    words.format: words for words in (FloatWords, Int8Words, Float8Words, Int4Words)
}
"""By the name of the format; None for floats."""


def describe_cache(caller: str, k: Any, v: Any, head_dim: int) -> CacheWords:
    """The description of a cache, of keys and values alike, for a `caller` that errors name.

    `k` and `v` are `CacheArrays`, or have their attributes.

    Raises:
      NotImplementedError: a head_dim that the kernels have no layout for.
      ValueError: arrays that do not fit the format, or each other.
    """
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"{caller}: head_dim={head_dim}; the kernels are laid out for "
            f"{', '.join(map(str, HEAD_DIMS))}. Use implementation='xla'."
        )
    codes = (k.codes, v.codes)
    kind = [(a.shape, a.dtype, side.format) for a, side in zip(codes, (k, v), strict=True)]
    if codes[0].ndim != 4 or kind[0] != kind[1] or not codes[0].size:
        found = " and ".join(
            f"{name} {format or ''} {dtype.name} {shape}"
            for name, (shape, dtype, format) in zip("kv", kind, strict=True)
        )
        raise ValueError(
            f"{caller}: expected k and v alike, [B, KH, S, ...] and not empty; found {found}."
        )
    (shape, dtype, format), _ = kind
    if format not in CACHE_WORDS:
        known = ", ".join(name for name in CACHE_WORDS if name)
        raise ValueError(f"{caller}: cache format {format!r}; expected None or one of {known}.")
    words = CACHE_WORDS[format]
    width = head_dim // words.packed
    if dtype not in words.dtypes or shape[-1] != width:
        names = " or ".join(jnp.dtype(d).name for d in words.dtypes)
        raise ValueError(
            f"{caller}: a {format or 'float'} cache of head_dim {head_dim} is "
            f"{names} [B, KH, S, {width}], found {dtype.name} {shape}."
        )
    given = {"scale": (k.scale, v.scale), "zero": (k.zero, v.zero)}
    expected = {"scale": format is not None, "zero": words.has_zero}
    if any((a is not None) != expected[name] for name, pair in given.items() for a in pair):
        found = [
            f"{side}.{name}"
            for name, pair in given.items()
            for side, a in zip("kv", pair, strict=True)
            if a is not None
        ]
        raise ValueError(
            f"{caller}: format {format!r}: both scales go with a quantized format, both zero "
            f"points with 'int4', and only there; found {', '.join(found) or 'none of them'}."
        )
    small = [a for pair in given.values() for a in pair if a is not None]
    kv_heads = shape[1]
    shapes = (shape[:3], (kv_heads, 1), (kv_heads, head_dim))
    if any(a.shape not in shapes or (a.ndim == 3) != (small[0].ndim == 3) for a in small):
        raise ValueError(
            f"{caller}: scales and zero points must all be [B, KH, S] = {list(shape[:3])} or all "
            f"[KH, D or 1] with KH={kv_heads} and D={head_dim}; found {[a.shape for a in small]}."
        )
    return words(dtype, bool(small) and small[0].ndim == 3, head_dim)
