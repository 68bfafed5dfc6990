"""Indices of sequences, checked as far as their values are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def batch_rows(rows: Any, batch: int, *, ndim: int | None = None) -> jax.Array:
    """Indices of sequences as int32, `[N]` or, without `ndim`, one.

    Raises:
      ValueError: what are no integers, another rank, or none of the batch where values are known.
    """
    found = rows if isinstance(rows, Tracer) else np.asarray(rows)
    if found.size and not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"rows: expected integers, found {found.dtype}.")
    if found.ndim > 1 or ndim not in (None, found.ndim):
        raise ValueError(f"rows: expected a list of rows, found {found.ndim} axes.")
    if isinstance(found, Tracer):
        return found.astype(jnp.int32)
    if found.size and (found.min() < 0 or found.max() >= batch):
        raise ValueError(f"rows: expected 0 to {batch - 1}, found {found.tolist()}.")
    return jnp.asarray(found, jnp.int32)
