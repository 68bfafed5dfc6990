"""`grouped_matmul` in plain XLA: an expert's weight is decoded for the rows that picked it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QuantizedWeight
from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.grouped_matmul.product import GroupedImplementation, GroupedProduct
from fdq.ops.matmul.dense import dense_product
from fdq.ops.matmul.xla import quantized_product
from fdq.ops.rows import as_array

_SMALLEST_TILE, _LARGEST_TILE = 16, 256


ExpertProduct = Callable[[jax.Array, jax.Array], jax.Array]
"""`(rows [M, K], expert) -> [M, N]` float32, independent row by row."""


class Xla(GroupedImplementation):
    """A loop over rows, or over tiles of one expert's rows."""

    name = "xla"

    def __call__(self, arguments: GroupedProduct) -> jax.Array:
        """One part, `[1, ..., N]`."""
        a, x = arguments, as_array(arguments.x)
        index = a.index.reshape(-1)
        rows = x.reshape(-1, x.shape[-1])
        if a.picks > 1:
            rows = jnp.repeat(rows, a.picks, axis=0, total_repeat_length=index.shape[0])
        experts, _, n = a.w.shape

        def product(rows, expert):
            scale = a.activation_scale
            if scale is not None and scale.size != 1:
                scale = scale.reshape(-1)[expert]
            one = pick_expert(a.w, expert)
            if isinstance(one, QuantizedWeight):
                return quantized_product(rows, one, a.activation, scale, path=a.path)
            if a.activation is not None:
                codes, scale = quantize_activation(rows, a.activation, scale, path=a.path)
                rows = activation_values(codes, scale, a.activation.group_size, rows.dtype)
            return dense_product(rows, one)

        def product_or_nothing(rows, expert):
            # Others' rows cost nothing: neither codes that are read nor products.
            nothing = functools.partial(jnp.zeros, (rows.shape[0], n), jnp.float32)
            return lax.cond(expert < experts, lambda: product(rows, expert), nothing)

        run = product_or_nothing if a.shard else product
        return for_each_expert(run, rows, index, experts, n).reshape(1, *a.index.shape, n)


def pick_expert(w: QuantizedWeight | jax.Array, index: jax.Array) -> Any:
    """Expert `index` of a stack; a dynamic slice of its codes, which fuses into the decoding."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), w)


def for_each_expert(
    product: ExpertProduct, x: jax.Array, index: jax.Array, experts: int, n: int
) -> jax.Array:
    """`y[t] = product(x[t:t + 1], index[t])`, a row or a tile of one expert's rows at a time."""
    t = x.shape[0]
    if t == 1:
        return product(x, index[0])
    if t <= max(experts, 2):

        def step(_, item):
            row, expert = item
            return None, product(row[None], expert)[0]

        return lax.scan(step, None, (x, index))[1]
    tile = tile_rows(t, experts)
    order = jnp.argsort(index, stable=True)
    counts = jnp.zeros((experts,), jnp.int32).at[index].add(1)
    first_row = jnp.cumsum(counts) - counts
    tiles = -(-counts // tile)
    last_tile = jnp.cumsum(tiles)
    # Rows beyond the last are written by its tile and cut off.
    rows = jnp.pad(x[order], [(0, tile), (0, 0)])

    def body(i, y):
        expert = jnp.searchsorted(last_tile, i, side="right").astype(jnp.int32)
        start = first_row[expert] + (i - last_tile[expert] + tiles[expert]) * tile
        # Rows of the next experts in this tile are wrong, and overwritten by tiles to come.
        block = product(lax.dynamic_slice_in_dim(rows, start, tile, axis=0), expert)
        return lax.dynamic_update_slice_in_dim(y, block, start, axis=0)

    y = jnp.zeros((t + tile, n), jnp.float32)
    y = lax.fori_loop(0, last_tile[-1], body, y)
    return jnp.zeros((t, n), jnp.float32).at[order].set(y[:t], unique_indices=True)


def tile_rows(t: int, experts: int) -> int:
    """Rows of one expert that are multiplied at a time."""
    tile = _SMALLEST_TILE
    while tile < _LARGEST_TILE and tile * experts < t:
        tile *= 2
    return tile
