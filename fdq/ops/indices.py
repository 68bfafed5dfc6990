"""Indices that callers give, of whatever integers they have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LIMITS = np.iinfo(np.int32)


def as_indices(indices: Any, what: str) -> jax.Array:
    """Integers of any width as int32: what is beyond its range stays out of every range.

    Arithmetic in the dtype that they come in would wrap around: 5 - 256 is 5 in uint8, and JAX
    cuts 2^40 to 0 where 64 bits are not enabled.

    Raises:
      TypeError: they are no integers.
    """
    found = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"{what}: expected integers, found {found.dtype}.")
    if jnp.iinfo(found.dtype).max <= _LIMITS.max:
        return jnp.asarray(found).astype(jnp.int32)
    if isinstance(found, np.ndarray):
        return jnp.asarray(np.clip(found, min(0, _LIMITS.min), _LIMITS.max).astype(np.int32))
    low, high = max(_LIMITS.min, jnp.iinfo(found.dtype).min), _LIMITS.max
    limits = (np.asarray(limit, found.dtype) for limit in (low, high))
    return jnp.clip(found, *limits).astype(jnp.int32)
