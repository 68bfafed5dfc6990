"""Products with experts that a router picked, on tensor cores: several rows an expert.

    y[p, n] = sum_k x[p // picks, k] * w[index[p], k, n]        picks = P / T

Rows are dealt out to tiles of one expert each (`deal`), by a few small XLA fusions; a program of
the kernel is a tile, a block of columns and a slice of K, and reads the words of the tile's expert
once for all its rows. There are programs for as many tiles as there might be; those that no row
needs end at once.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.matmul import mma_products as mma
from pallas_kernels.matmul.core import kernel_operands
from pallas_kernels.matmul.matrix_vector import kernel_name, multiprocessors
from pallas_kernels.matmul.mma import (
    MmaConfig,
    accumulate,
    arranged,
    check_mma_config,
    choose_mma_config,
    store_totals,
    tile_of,
    unsupported,
)
from pallas_kernels.matmul.row_sources import Rows, finished, rows_shape
from pallas_kernels.mosaic.launch import launch
from pallas_kernels.transformations import batchable
from pallas_kernels.typing import Array, Float, Int
from pallas_kernels.weights.kernel_weight import KernelWeight


def gathered_mma(
    x: Rows,
    w: KernelWeight,
    index: Int[Array, " p"],
    *,
    config: MmaConfig | None = None,
    tile_rows: int | None = None,
) -> Float[Array, "split p n"]:
    """Partial sums of `x[p // picks] @ w[index[p]]`: float32 `[split, P, N]`.

    Rows x are those of `mma_matmul`, `[T, K]`, T a divisor of P; w is `[E, K, N]`, indices are
    0 .. E - 1, or E of nobody, whose products are zeros and cost nothing, and `tile_rows` (8, 16 or
    32) rows of an expert share a program. The meaning is that of
    `gathered_matrix_vector_reference`. There is no gradient. What does not fit is a ValueError.
    """
    t, k = rows_shape(x, "gathered_mma", int8=True)
    picks = index.size
    if w.words.ndim != 3 or k != w.layout.k or index.ndim != 1 or not picks or picks % t:
        raise ValueError(
            f"gathered_mma: x {(t, k)} needs w [E, K={k}, N] and index [P] with P a multiple of "
            f"T={t}; found w {w.shape} and index {index.shape}."
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"gathered_mma: expected int32 index [P], found {index.dtype.name}.")
    if reason := unsupported(w.layout, x.dtype):
        raise ValueError(f"gathered_mma: {reason}.")
    experts = w.words.shape[0]
    tile_rows = choose_tile_rows(picks, experts) if tile_rows is None else tile_rows
    if tile_rows not in (8, 16, 32):
        raise ValueError(f"gathered_mma: expected tile_rows 8, 16 or 32, found {tile_rows}.")
    if config is None:
        config = gathered_mma_config(w, picks)
    check_mma_config(config, "gathered_mma")
    run = functools.partial(_gathered_mma, config=config, tile_rows=tile_rows)
    return batchable(run)(x, w, index.astype(jnp.int32))


def gathered_mma_config(w: KernelWeight, picks: int) -> MmaConfig:
    """The default for `picks` products at a time, for a device that nobody tuned for."""
    hit = min(picks, w.words.shape[0])
    return choose_mma_config(w.layout, 8, -(-multiprocessors() // hit))


def choose_tile_rows(picks: int, experts: int) -> int:
    """So many that few experts have more, if picks are spread evenly."""
    return 8 if picks <= 4 * experts else 16 if picks <= 10 * experts else 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Which rows are multiplied together."""

    expert: jax.Array  # int32 [tiles]; E of a tile without rows
    place: jax.Array  # int32 [P]: of each pick, its row in the tiles
    pick: jax.Array  # int32 [tiles * rows]: of each of those rows, the pick (any where it is free)


def deal(index: Int[Array, " p"], experts: int, rows: int) -> Tiles:
    """Deals picks out to tiles of `rows` of one expert each, in the order of the experts.

    Those of the index E are dealt to no tile: their place is past the last.
    """
    picks = index.shape[0]
    count = min(picks, picks // rows + min(picks, experts))
    same = index[:, None] == index[None, :]
    earlier = jnp.arange(picks)[:, None] > jnp.arange(picks)[None, :]
    rank = jnp.sum(same & earlier, axis=1, dtype=jnp.int32)
    counts = jnp.sum(index[:, None] == jnp.arange(experts)[None, :], axis=0, dtype=jnp.int32)
    tiles = (counts + (rows - 1)) // rows
    place = (jnp.cumsum(tiles, dtype=jnp.int32) - tiles)[index] * rows + rank
    place = jnp.where(index < experts, place, count * rows)
    expert = jnp.full((count,), experts, jnp.int32).at[place // rows].set(index, mode="drop")
    pick = jnp.zeros((count * rows,), jnp.int32)
    pick = pick.at[place].set(jnp.arange(picks, dtype=jnp.int32), mode="drop")
    return Tiles(expert, place, pick)


@functools.partial(jax.jit, static_argnames=("config", "tile_rows"))
def _gathered_mma(x, w, index, *, config, tile_rows) -> jax.Array:
    layout, experts = w.layout, w.words.shape[0]
    x = finished(x)
    tiles = deal(index, experts, tile_rows)
    rows = x[tiles.pick // (index.shape[0] // x.shape[0])]
    tile, split = tile_of(layout, tile_rows, x.dtype, config)
    operands, name_refs = kernel_operands(w)
    block = tile.chunks * mma.COLUMNS

    def body(expert_ref, x_ref, *refs):
        *weight_refs, out_ref = refs
        part, number = lax.axis_index("split"), lax.axis_index("tile")
        first = pl.multiple_of(lax.axis_index("columns") * block, block)
        expert = expert_ref[number]

        @pl.when(expert < experts)
        def _():
            own = name_refs(weight_refs).expert(expert)
            some = pl.ds(number * tile.rows, tile.rows)
            totals = accumulate(tile, own, x_ref.at[:, some], first, part * tile.segments)
            store_totals(out_ref.at[part, some], totals, first)

    body.__name__ = kernel_name("gathered_mma", layout, tile_rows)
    out = launch(
        body,
        (tiles.expert, arranged(rows, layout), *operands),
        out_type=jax.ShapeDtypeStruct((split, rows.shape[0], layout.padded_n), jnp.float32),
        grid=(layout.padded_n // block, split, tiles.expert.shape[0]),
        grid_names=("columns", "split", "tile"),
    )
    out = jnp.take(out, tiles.place, axis=1, mode="clip")[..., : layout.n]
    return jnp.where((index < experts)[None, :, None], out, jnp.float32(0))
