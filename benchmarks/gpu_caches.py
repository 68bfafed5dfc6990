"""Random caches for attention, append and the decode step."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_cases import AttentionCase
from benchmarks.gpu_timing import links_for
from benchmarks.gpu_weights import nbytes, random_cache
from fdq.cache import LayerCache, parse_format
from fdq.schemes.scheme import CacheSpec


def random_caches(
    case: AttentionCase, dtype: Any, l2_bytes: int, *, smoke: bool
) -> list[LayerCache]:
    """Different caches of a case, together larger than the L2 cache four times."""
    spec = parse_format(case.format)
    make = functools.partial(_random, case=case, spec=spec, dtype=jnp.dtype(dtype).name)
    size = nbytes(jax.eval_shape(make, jax.random.key(0)))
    seed = jax.random.key(zlib.crc32(case.key.encode()))
    keys = jax.random.split(seed, links_for(size, l2_bytes, smoke=smoke))
    return [make(key) for key in keys]


def _random(key: jax.Array, case: AttentionCase, spec: CacheSpec | None, dtype: str) -> LayerCache:
    shape = (case.batch, case.kv_heads, case.slots, case.head_dim)
    return LayerCache(*(random_cache(k, shape, spec, dtype) for k in jax.random.split(key)))
