"""Caches as kernels of attention and of `rope_append` take them."""

from __future__ import annotations

from typing import Any

from fdq.cache.cache_tensor import CacheTensor


def cache_unsupported(k: CacheTensor, v: CacheTensor) -> str | None:
    """Why kernels do not read or write such a cache; None if they do."""
    from pallas_kernels.cache.words import HEAD_DIMS

    if (k.spec, k.codes.dtype) != (v.spec, v.codes.dtype):
        return f"the kernels take keys and values of one format, found {k.spec} and {v.spec}"
    if k.spec is not None and k.format.kernel is None:
        return f"no kernel reads a {k.format.name} cache"
    if k.head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"the kernels take head_dim {sizes}, found {k.head_dim}"
    return None


def kernel_arrays(tensor: CacheTensor) -> Any:
    """Keys or values as kernels take them."""
    from pallas_kernels.cache.arrays import CacheArrays

    return CacheArrays(tensor.codes, tensor.scale, tensor.zero, tensor.format.kernel)


def kind_of(k: CacheTensor) -> str:
    """What the tuning table calls a cache's format."""
    return k.codes.dtype.name if k.spec is None else k.spec.format
