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
    low = max(_LIMITS.min, jnp.iinfo(found.dtype).min)
    limits = (np.asarray(limit, found.dtype) for limit in (low, _LIMITS.max))
    clip = np.clip if isinstance(found, np.ndarray) else jnp.clip
    return jnp.asarray(clip(found, *limits).astype(np.int32))
