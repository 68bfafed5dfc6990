"""Second moments of rows, for all rows together and for each expert, and of gradients at outputs.

Sums are float32, of products in full precision. A gradient is seen on its way back: `tapped` hands
its argument on, and the derivative by its accumulator is the sum of g gᵀ over rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_TILE = 64  # rows of one expert that are multiplied at a time

SHRINKAGE = 0.25
"""Of K tokens: an expert's moments count by its tokens, those of its layer by so many."""


def gram(rows: jax.Array) -> jax.Array:
    """`[P, K]` -> the sum of x xᵀ, `[K, K]`."""
    return jnp.einsum(
        "pk,pl->kl", rows, rows, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def expert_grams(rows: jax.Array, index: jax.Array, experts: int) -> jax.Array:
    """Rows `[P, K]`, one expert each `[P]` -> `[experts, K, K]`, the sums of x xᵀ of each.

    A row with an index that no expert has counts for none.
    """
    p, k = rows.shape
    order = jnp.argsort(index, stable=True)
    counts = jnp.zeros((experts,), jnp.int32).at[index].add(1, mode="drop")
    tiles = -(-counts // _TILE)
    first_row, first_tile = jnp.cumsum(counts) - counts, jnp.cumsum(tiles) - tiles
    within = jnp.arange(_TILE, dtype=jnp.int32)

    def add(tile: jax.Array, sums: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(first_tile, tile, side="right").astype(jnp.int32) - 1
        offset = (tile - first_tile[expert]) * _TILE + within
        own = rows[order[jnp.minimum(first_row[expert] + offset, p - 1)]]
        own = jnp.where((offset < counts[expert])[:, None], own, jnp.float32(0))
        return sums.at[expert].add(gram(own))

    return lax.fori_loop(0, jnp.sum(tiles), add, jnp.zeros((experts, k, k), jnp.float32))


@jax.custom_vjp
def tapped(y: jax.Array, sums: jax.Array, index: jax.Array | None) -> jax.Array:
    """`y [..., N]` as it is; of `sums` the derivative is the sum of g gᵀ, g the gradient at y.

    `sums` is `[N, N]`, or with an expert a row (`index`, of y's leading axes) `[experts, N, N]`.
    """
    del sums, index
    return y


def _tapped(y: jax.Array, sums: jax.Array, index: jax.Array | None):
    return y, (sums.shape, index)


def _tapped_backwards(kept, g: jax.Array):
    shape, index = kept
    rows = g.reshape(-1, shape[-1]).astype(jnp.float32)
    if index is None:
        return g, gram(rows), None
    none = np.zeros(index.shape, jax.dtypes.float0)
    return g, expert_grams(rows, index.reshape(-1), shape[0]), none


tapped.defvjp(_tapped, _tapped_backwards)


def shrunk(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over the rows of each expert -> means, of which few rows borrow from all.

    Args:
      totals: `[..., experts, K, K]` sums of x xᵀ.
      counts: `[..., experts]` rows of each.

    Returns:
      `(totals + c mean) / (counts + c)`, `mean` that of all experts' rows and c a quarter of K: an
      expert that saw nothing has the mean, one that saw many rows hardly any of it.
    """
    borrowed = SHRINKAGE * totals.shape[-1]
    rows = np.maximum(counts.sum(axis=-1), 1)[..., None, None]
    mean = totals.sum(axis=-3) / rows
    counts = counts[..., None, None].astype(np.float32)
    return ((totals + borrowed * mean[..., None, :, :]) / (counts + borrowed)).astype(np.float32)


def drawn_loss(logits: Any, batch: jax.Array, real: jax.Array | None, key: jax.Array) -> jax.Array:
    """Cross entropy of labels drawn from what the model predicts, summed over real positions."""
    shape = getattr(logits, "shape", ())
    if len(shape) != 3 or shape[:2] != batch.shape[:2]:
        raise TypeError(
            f"calibrate: output_moments needs logits [B, L, V] of a batch {list(batch.shape)}, "
            f"found {type(logits).__name__} {list(shape)}. Pass loss=, or a forward= that returns "
            "them."
        )
    logits = logits.astype(jnp.float32)
    labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(losses if real is None else jnp.where(real, losses, 0.0))
