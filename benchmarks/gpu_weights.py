"""Random quantized weights and caches, made on the device and never in 16 bits as a whole."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq.cache.cache_tensor import CacheTensor, quantize_cache, sample_scales
from fdq.formats.qtensor import QTensor
from fdq.quantizers import quantize_array
from fdq.schemes.scheme import CacheSpec, WeightSpec

_COLUMNS = 512  # quantized for real, then repeated up to N: a multiple of every block size
_EXPERTS = 2


def weight_spec(name: str) -> WeightSpec:
    """The spec of the weight part of a scheme's name: ``"W4"``, ``"Wfp8-b128"``."""
    spec = WeightSpec.parse(name)
    if spec is None:
        raise ValueError(f"{name!r} leaves weights in 16 bits; expected a quantized format")
    return spec


@functools.partial(jax.jit, static_argnames=("shape", "spec"))
def random_weight(key: jax.Array, shape: tuple[int, ...], spec: WeightSpec) -> QTensor:
    """A QTensor ``[..., K, N]`` of normal weights of variance 1 / K.

    The first columns (and experts) are quantized from random numbers, the others repeat them:
    the codes are as random as those of a real weight, and at most 512 columns of floats exist.

    Args:
      key: of the random numbers.
      shape: ``(..., K, N)``.
      spec: how the weight is stored.
    """
    *lead, k, n = shape
    columns = min(n, _COLUMNS)
    experts = [min(e, _EXPERTS) for e in lead]
    w = jax.random.normal(key, (*experts, k, columns), jnp.float32) * jnp.float32(k**-0.5)
    q = quantize_array(w, spec)

    def widen(a: jax.Array) -> jax.Array:
        if a.shape[-1] > 1:
            a = _repeat(a, -1, math.ceil(n * a.shape[-1] / columns))
        for axis, size in enumerate(lead):
            a = _repeat(a, axis, size)
        return a

    return jax.tree.map(widen, q)


def _repeat(a: jax.Array, axis: int, size: int) -> jax.Array:
    """``a`` over and over along ``axis``, cut to ``size``."""
    have = a.shape[axis]
    if have >= size:
        return jax.lax.slice_in_dim(a, 0, size, axis=axis)
    index = jnp.arange(size, dtype=jnp.int32) % have
    return jnp.take(a, index, axis=axis)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float = 1.0):
    """Normal numbers of standard deviation ``scale``, made in ``dtype``."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


@functools.partial(jax.jit, static_argnames=("shape", "spec", "dtype"))
def random_cache(
    key: jax.Array, shape: tuple[int, int, int, int], spec: CacheSpec | None, dtype: Any
) -> CacheTensor:
    """Random keys or values ``[B, KH, S, D]``.

    Static scales fit normal numbers. As with weights, the first slots are
    quantized for real and repeated.
    """
    b, kh, slots, d = shape
    few = min(slots, _COLUMNS)
    x = jax.random.normal(key, (b, kh, few, d), jnp.float32)
    tensor = quantize_cache(x, spec, **sample_scales(spec, kh, d))
    if spec is None:
        tensor = CacheTensor(x.astype(dtype))
    # Static scales have no slots.
    return jax.tree.map(lambda a: _repeat(a, 2, slots) if a.ndim > 2 else a, tensor)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree; ``jax.ShapeDtypeStruct`` s count as well."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in leaves)
