"""Feedback between columns of a weight: a block of them makes up for the errors of those before.

Minimizes `tr(G Dᵀ H D)`, D the change of a weight `[K, N]` and G `[N, N]` the second moment of the
loss' gradient at the output: what is left of a block is spread over the columns to come as G says
(YAQA, arXiv 2505.22988). Blocks are taken in the order of their mean squares of gradients. How the
columns of a block are encoded is up to the format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.quantizers import second_moment

DAMPING = 0.01
"""Of the mean square of gradients."""

Encode = Callable[[jax.Array, jax.Array], tuple[tuple[jax.Array, ...], jax.Array]]
"""`[K, n]` and a root C `[n, n]`, upper triangular, of what its errors E cost, the squares of `E C`
-> arrays and what they decode to."""


def by_blocks(w: jax.Array, outputs: jax.Array, size: int, encode: Encode) -> tuple[jax.Array, ...]:
    """The arrays of blocks of `size` columns (and of one that is shorter), side by side.

    `outputs` `[N, N]` is the second moment of gradients, as calibrated.
    """
    n = w.shape[1]
    whole = n // size
    outputs = second_moment.damped(outputs, DAMPING)
    # Blocks of the largest gradients first, as long as all others can make up for them.
    squares = jnp.diagonal(outputs)[: whole * size].reshape(whole, size)
    order = jnp.argsort(-jnp.sum(squares, axis=1), stable=True)
    columns = (
        jnp.arange(n)
        .at[: whole * size]
        .set((order[:, None] * size + jnp.arange(size)[None]).reshape(-1))
    )
    w = w[:, columns]
    factor = second_moment.feedback_factor(second_moment.in_order(outputs, columns))

    def block(w: jax.Array, start: Any, size: int):
        rows = lax.dynamic_slice_in_dim(factor, start, size)  # [size, N]
        inner = lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        # What errors cost, once the columns to come have made up for them.
        root = jax.scipy.linalg.solve_triangular(
            inner, jnp.eye(size, dtype=jnp.float32), lower=False
        )
        part = lax.dynamic_slice_in_dim(w, start, size, axis=1)
        arrays, decoded = encode(part, root)
        left = part - decoded
        errors = jax.scipy.linalg.solve_triangular(inner.T, left.T, lower=True).T
        return w - second_moment.product(errors, rows), arrays

    found = []
    if whole:
        starts = jnp.arange(0, whole * size, size)
        w, parts = lax.scan(lambda w, start: block(w, start, size), w, starts)
        back = jnp.argsort(order)
        found.append([jnp.moveaxis(a[back], 0, 1).reshape(a.shape[1], -1) for a in parts])
    if n > whole * size:
        found.append(block(w, whole * size, n - whole * size)[1])
    return tuple(jnp.concatenate(a, axis=1) for a in zip(*found, strict=True))
