"""What derivatives of `grouped_matmul` are made of: products that JAX differentiates by itself.

Loops here have a length that is known while tracing, which reverse mode needs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.ops.dots import exact_dot
from fdq.ops.grouped_matmul.xla import pick_expert, tile_rows
from fdq.ops.matmul import derivative


def picked_product(rows: jax.Array, w: Any, index: jax.Array) -> jax.Array:
    """`rows[p] @ w[index[p]]`: `[P, K]`, `[E, K, N]` and `[P]` -> float32 `[P, N]`."""
    p, experts, n = rows.shape[0], w.shape[0], w.shape[-1]
    rows = rows.astype(jnp.float32)

    # Checkpointed: what is kept until the backward pass are the codes, not the decoded weights.
    @jax.checkpoint
    def product(rows: jax.Array, expert: jax.Array, w: Any) -> jax.Array:
        one = pick_expert(w, expert)
        one = dequantize(one) if isinstance(one, QuantizedWeight) else one.astype(jnp.float32)
        return exact_dot(rows, one)

    if p <= max(experts, 2):
        return lax.map(lambda item: product(item[0][None], item[1], w)[0], (rows, index))
    # Rows by expert, those of each in tiles of its own.
    tile = tile_rows(p, experts)
    tiles = (p + experts * (tile - 1)) // tile
    order = jnp.argsort(index, stable=True)
    expert = index[order]
    counts = jnp.zeros((experts,), jnp.int32).at[index].add(1)
    first_row = jnp.cumsum(counts) - counts
    last_tile = jnp.cumsum(-(-counts // tile))
    first_tile = last_tile - -(-counts // tile)
    place = jnp.zeros((p,), jnp.int32)
    place = place.at[order].set(
        first_tile[expert] * tile + jnp.arange(p, dtype=jnp.int32) - first_row[expert]
    )
    blocks = jnp.zeros((tiles * tile, rows.shape[-1]), jnp.float32)
    blocks = blocks.at[place].set(rows, unique_indices=True).reshape(tiles, tile, -1)

    def of_tile(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        block, i = item
        one = jnp.searchsorted(last_tile, i, side="right").astype(jnp.int32)
        empty = i >= last_tile[-1]
        return lax.cond(
            empty, lambda: jnp.zeros((tile, n), jnp.float32), lambda: product(block, one, w)
        )

    y = lax.map(of_tile, (blocks, jnp.arange(tiles, dtype=jnp.int32)))
    return y.reshape(tiles * tile, n)[place]


def changed_product(
    rows: jax.Array, w: Any, index: jax.Array, tangents: dict[int, jax.Array]
) -> jax.Array:
    """`picked_product` with the change of the weights for tangents of their leaves, by number."""
    rows = rows.astype(jnp.float32)

    @jax.checkpoint
    def of_expert(expert, w, tangents):
        mine = jnp.where((index == expert)[:, None], rows, jnp.zeros_like(rows))
        return exact_dot(mine, derivative.change(w, tangents))

    def step(y, item):
        return y + of_expert(*item), None

    items = jnp.arange(w.shape[0], dtype=jnp.int32), w, tangents
    return lax.scan(step, jnp.zeros((rows.shape[0], w.shape[-1]), jnp.float32), items)[0]
