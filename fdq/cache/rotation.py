"""Heads turned by a Hadamard matrix: what one channel holds is spread over all.

The matrix is orthogonal and its own inverse: queries that are turned likewise have the same scores
with turned keys, and what attention makes of turned values is turned back by it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.cache
def hadamard(width: int) -> np.ndarray:
    """Sylvester's matrix over `sqrt(width)`, float32; `width` is a power of two."""
    rows = np.arange(width)
    signs = np.bitwise_count(rows[:, None] & rows[None, :]) % 2
    return ((1.0 - 2.0 * signs) / np.sqrt(width)).astype(np.float32)


def rotated(x: jax.Array) -> jax.Array:
    """`x [..., D]` float32, turned; done twice it is x again.

    Channels are turned as many together as the largest power of two that divides D.
    """
    d = x.shape[-1]
    width = d & -d
    if width == 1:
        return x
    parts = x.reshape(*x.shape[:-1], d // width, width)
    turned = lax.dot_general(
        parts,
        jnp.asarray(hadamard(width)),
        (((parts.ndim - 1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return turned.reshape(x.shape)
