"""Matrix-vector products with a quantized weight, M = 1 .. 8 rows of x, CUDA cores, every GPU.

    y[m, n] = sum_k x[m, k] * w[k, n]

A program owns a block of columns and a slice of K; its sums go to their own row of
`[split, M, N]`, which the consumer adds up: an XLA fusion (residual and norm), or the next
kernel's prologue. So the sum is deterministic, and there is no second pass of our own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.device import MOST_ROWS, default_device
from pallas_kernels.matmul.core import (
    Tile,
    WeightRefs,
    accumulate,
    first_words,
    kernel_operands,
    stage,
    staging_factors,
)
from pallas_kernels.matmul.row_sources import (
    Rows,
    finished,
    readable,
    row_operands,
    row_reader,
    rows_cotangent,
    rows_shape,
)
from pallas_kernels.mosaic.launch import launch, store, synchronize
from pallas_kernels.transformations import batchable, differentiable
from pallas_kernels.typing import Array, Float
from pallas_kernels.weights.decoded_weight import decoded_weight
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.layout import WeightLayout

_MOST_STAGED = 32 * 1024
"""Bytes of staged x: a T4 has 64 KiB of shared memory for all programs of a multiprocessor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixVectorConfig:
    """How a product is cut into programs."""

    block_columns: int  # of a program: 128, 256 or 512 (1, 2 or 4 a thread)
    split: int  # slices of K; rounded down to a divisor of the segments of a column
    step_rows: int  # rows of K that a step decodes: a power of two times the rows of a unit
    prefetch: bool = True  # whether a step loads the next one's words before its own arithmetic


def matrix_vector_reference(x: Rows, w: KernelWeight) -> Float[Array, "1 m n"]:
    """The meaning of `matrix_vector`: float32 `[1, M, N]` of the decoded weight."""
    x = finished(x).astype(jnp.float32)
    return lax.dot(x, decoded_weight(w), precision=lax.Precision.HIGHEST)[None]


def matrix_vector(
    x: Rows,
    w: KernelWeight,
    *,
    split: int | None = None,
    block_columns: int | None = None,
    config: MatrixVectorConfig | None = None,
) -> Float[Array, "split m n"]:
    """Partial sums of `x @ w`, to be added up over the first axis: float32 `[split, M, N]`.

    x is `[M, K]` bf16, f16 or f32, M at most 8, magnitudes below 2^60; or `Gated` or `Normed`,
    which are finished as they are staged. `split` and `block_columns` override the config, which
    the device chooses if None. There is a gradient with respect to x, not to w. Shapes that do not
    fit are a ValueError.
    """
    m, k = rows_shape(x, "matrix_vector")
    if w.words.ndim != 2 or k != w.layout.k:
        raise ValueError(f"matrix_vector: x {(m, k)} needs a weight [K={k}, N], found {w.shape}.")
    if not 1 <= m <= MOST_ROWS:
        raise ValueError(
            f"matrix_vector: x has {m} rows, expected 1 .. {MOST_ROWS}; use XLA for more."
        )
    if config is None:
        config = choose_config(w.layout, m, multiprocessors())
    changes: dict[str, Any] = {"split": split, "block_columns": block_columns}
    config = dataclasses.replace(config, **{f: v for f, v in changes.items() if v is not None})
    return _transformable(config)(readable(x, w.layout, m), w)


def _transformable(config: MatrixVectorConfig):
    """The launch with its gradient and its rule for vmap: a batch is rows of x, if they fit."""
    kernel = functools.partial(_matrix_vector, config=config)

    def gradient(cotangent, x, w):
        return rows_cotangent(cotangent, x, w, decoded_weight(w)), None

    return differentiable(batchable(kernel, rows_of_a_batch(kernel, config)), gradient)


def rows_of_a_batch(kernel: Any, config: MatrixVectorConfig):
    """For `transformations.batchable`: a batch of x is more rows of x, where they fit a launch.

    The kernel `(x [M, K], w)` -> `[split, M, N]` cuts the product by `config`.
    """

    def fold(axis_size, batched, x, w):
        if not isinstance(x, jax.Array) or any(jax.tree.leaves(batched[1])):
            return None
        m, k = x.shape[1:]
        if axis_size * m > MOST_ROWS:
            return None
        _, split = tile_of(w.layout, m, config)
        if tile_of(w.layout, axis_size * m, config)[1] != split:
            return None
        out = kernel(x.reshape(axis_size * m, k), w)
        return jnp.moveaxis(out.reshape(split, axis_size, m, -1), 1, 0)

    return fold


def choose_config(layout: WeightLayout, m: int, multiprocessors: int) -> MatrixVectorConfig:
    """The default for a device that nobody tuned for.

    What memory needs is bytes on their way: a program has 8 KiB, and an H100 was at 57 to 65 % of
    its bandwidth with two programs a multiprocessor, at 81 % with three. So few rows (`m`) take
    blocks of 256 columns, whose registers allow six of them (blocks of 512, which need the fewest
    instructions, allow two), or, where these are too few, of 128. Partial sums are traffic too,
    which a consumer may read more than once: K is rather split eight ways than 16.
    """
    columns = layout.padded_n
    wanted, enough_of_them = (4, 0.65) if m <= 2 else (2, 0.45)
    wanted = wanted * multiprocessors
    in_flight = {1: 16, 2: 16, 3: 8, 4: 8}.get(m, 4)  # words of a thread
    blocks = [block for block in (512, 256, 128) if columns % block == 0]
    if m <= 2:
        ways = [(block, most) for block in blocks if block < 512 for most in (8, 16)]
    else:  # a thread with one column waits for shared memory four times as long as it multiplies
        blocks = [block for block in blocks if block > 128] or blocks
        ways = [(block, most) for block in blocks for most in (8, 16)]
    cuts = [
        (block, _split(layout.segments, most, 0.8 * wanted * block / columns))
        for block, most in ways
    ]
    enough = (cut for cut in cuts if columns // cut[0] * cut[1] >= enough_of_them * wanted)
    block, split = next(enough, cuts[-1])
    units = max(1, in_flight * 128 // (block * layout.words.words))
    units = 1 << (units.bit_length() - 1)
    return MatrixVectorConfig(block_columns=block, split=split, step_rows=units * layout.words.rows)


def _split(segments: int, most: int, wanted: float) -> int:
    """The smallest divisor of `segments` that is `wanted` or more, or the largest up to `most`."""
    most = whole_split(segments, most)
    return next(d for d in range(1, most + 1) if segments % d == 0 and (d >= wanted or d == most))


def whole_split(segments: int, split: int) -> int:
    """The largest divisor of `segments` that is no more than `split`."""
    return max(d for d in range(1, min(segments, max(split, 1)) + 1) if segments % d == 0)


def multiprocessors() -> int:
    """Of the device that the trace is for; 4 in the interpreter, so that it splits as well."""
    return getattr(default_device(), "core_count", None) or 4


def tile_of(layout: WeightLayout, m: int, config: MatrixVectorConfig) -> tuple[Tile, int]:
    """What one program computes, and how many share a column; or ValueError."""
    if config.block_columns not in (128, 256, 512) or layout.padded_n % config.block_columns:
        raise ValueError(
            f"matrix_vector: block_columns={config.block_columns} must be 128, 256 or 512 and "
            f"divide the padded N={layout.padded_n}."
        )
    units, rest = divmod(config.step_rows, layout.words.rows)
    if config.step_rows < 1 or (units & (units - 1)) or (rest and units):
        raise ValueError(
            f"matrix_vector: step_rows={config.step_rows} must be {layout.words.rows} (rows of a "
            f"unit of {layout.format}) times a power of two, or less than that."
        )
    if config.split < 1:
        raise ValueError(f"matrix_vector: split={config.split}, expected 1 or more.")
    staged = 4 * m * layout.segments * layout.segment
    split = whole_split(layout.segments, config.split)
    if staged > split * _MOST_STAGED:
        least = min(-(-staged // _MOST_STAGED), layout.segments)
        split = next(d for d in range(least, layout.segments + 1) if layout.segments % d == 0)
    tile = Tile(
        layout=layout,
        rows=m,
        columns=config.block_columns,
        segments=layout.segments // split,
        units=max(1, config.step_rows // layout.words.rows),
        prefetch=config.prefetch,
    )
    return tile, split


class Product:
    """One of the products of a launch: its operands, and a program of it."""

    def __init__(self, x: Rows, weight: KernelWeight, rows: int, config: MatrixVectorConfig):
        self.x, self.weight = x, weight
        self.tile: Tile
        self.tile, self.split = tile_of(weight.layout, rows, config)
        self.blocks = weight.layout.padded_n // self.tile.columns
        self.programs = self.blocks * self.split
        self._of_x = row_operands(x, weight.layout)
        self._of_weight, self._name_refs = kernel_operands(weight)

    @property
    def operands(self) -> list[jax.Array]:
        """Of the launch, in the order that `take_inputs` takes their refs in."""
        factors = jnp.asarray(staging_factors(self.weight.layout))
        return [factors, *self._of_x, *self._of_weight]

    def take_inputs(self, refs: Any) -> tuple[Any, list[Any], WeightRefs]:
        """The refs of staging factors, x and weight from an iterator."""
        factors = next(refs)
        x_refs = [next(refs) for _ in self._of_x]
        return factors, x_refs, self._name_refs([next(refs) for _ in self._of_weight])

    def place(self, program: Any) -> tuple[Any, Any]:
        """Slice of K and block of columns: programs count blocks first."""
        return program // self.blocks, program % self.blocks

    def run(
        self, inputs, scratch, part, block, out_ref, *, row=0, out_row: Any = 0, expert: Any = None
    ) -> None:
        """A program: a slice of K and a block of columns."""
        factors_ref, x_refs, weight_refs = inputs
        staged_ref, sums_ref, norms_ref = scratch
        tile, layout = self.tile, self.weight.layout
        if expert is not None:
            weight_refs = weight_refs.expert(expert)
        first_column = pl.multiple_of(block * tile.columns, tile.columns)
        first_segment = part * tile.segments
        where = tile, weight_refs, first_column, first_segment
        fetched = first_words(*where)  # before norms, which read all of x
        read_x = row_reader(self.x, x_refs, layout, row, tile.rows, first_segment, norms_ref)
        stage(tile, read_x, factors_ref, staged_ref, sums_ref)
        synchronize()
        totals = accumulate(*where, staged_ref, sums_ref, fetched)
        rows = pl.ds(out_row, tile.rows)
        store(out_ref.at[part, rows, pl.ds(first_column, tile.columns)], totals)


@functools.partial(jax.jit, static_argnames=("config",))
def _matrix_vector(x, w, *, config) -> jax.Array:
    layout, m = w.layout, x.shape[0]
    product = Product(x, w, m, config)

    def body(*refs):
        refs = iter(refs)
        inputs, out_ref = product.take_inputs(refs), next(refs)
        place = lax.axis_index("split"), lax.axis_index("columns")
        product.run(inputs, list(refs), *place, out_ref)

    body.__name__ = kernel_name("matrix_vector", layout, m)
    out = launch(
        body,
        product.operands,
        out_type=jax.ShapeDtypeStruct((product.split, m, layout.padded_n), jnp.float32),
        grid=(product.blocks, product.split),
        grid_names=("columns", "split"),
        scratch_types=product.tile.scratch,
    )
    return out[..., : layout.n]


def kernel_name(prefix: str, layout: WeightLayout, m: int) -> str:
    """A name that profilers and reports show."""
    group = "" if layout.group is None else f"_g{layout.group}"
    return f"{prefix}_{layout.format}{group}_m{m}"
