"""What x of a matrix kernel may be, and how the kernel reads it while it stages it.

An array ``[M, K]``; `Gated`, the partial sums of gate and up; `Normed`, rows that want their norm.
The last two save the launches that XLA would need to finish the rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.layouts import WeightLayout
from pallas_kernels.matrix_vector_core import ReadX, load
from pallas_kernels.staging import Normed, inverse_root_mean_square, whole


@dataclasses.dataclass(frozen=True)
class Gated:
    """``silu(gate) * up``, still as the partial sums of the product that made gate and up.

    Attributes:
      partials: float32 ``[split, M, 2 I]``, gate first.
      dtype: that gate, up and the result are rounded to, as a model in that dtype does.
    """

    partials: Any
    dtype: Any = dataclasses.field(default=jnp.bfloat16, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """``(M, I)``."""
        return self.partials.shape[-2], self.partials.shape[-1] // 2

    def value(self) -> jax.Array:
        """``[M, I]`` in `dtype`."""
        gate, up = jnp.split(jnp.sum(self.partials, axis=0), 2, axis=-1)
        return gated(gate, up, self.dtype).astype(self.dtype)


jax.tree_util.register_dataclass(Gated, data_fields=["partials"], meta_fields=["dtype"])


def gated(gate: jax.Array, up: jax.Array, dtype: Any) -> jax.Array:
    """float32 ``silu(gate) * up``: of rounded numbers, rounded once, as XLA does in `dtype`."""

    def rounded(a):
        return a.astype(dtype).astype(jnp.float32)

    gate = rounded(gate)
    return rounded(gate / (1.0 + jnp.exp(-gate)) * rounded(up))


Rows = jax.Array | Gated | Normed


def finished(x: Rows) -> jax.Array:
    """The rows as an array ``[M, K]``."""
    return x.value() if isinstance(x, (Gated, Normed)) else x


def readable(x: Rows, layout: WeightLayout) -> Rows:
    """`x`, finished where a kernel cannot: gate and up must end where segments do."""
    if isinstance(x, Gated) and layout.k % layout.segment:
        return x.value()
    return x


def row_operands(x: Rows, layout: WeightLayout) -> list[jax.Array]:
    """The arrays that a kernel reads x from."""
    shape = (layout.segments, layout.segment_units, layout.words.rows, 1)
    if isinstance(x, Gated):
        parts, m, _ = x.partials.shape
        return [x.partials.reshape(parts, m, 2, *shape)]

    def by_segments(a):
        missing = layout.segments * layout.segment - a.shape[-1]
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]) if missing else a
        return a.reshape(*a.shape[:-1], *shape)

    if isinstance(x, Normed):
        return [by_segments(x.x), by_segments(x.scale), whole(x.x)]
    return [by_segments(x)]


def row_reader(
    x: Rows, refs: Sequence[Any], layout: WeightLayout, first_row: Any, rows: int, segment: Any
) -> ReadX:
    """``read_x`` of `matrix_vector_core.stage`.

    Args:
      x: for its kind only.
      refs: of `row_operands`.
      layout: of the weight.
      first_row: of x, of the program.
      rows: how many.
      segment: the first of the program.
    """

    def places(first, tile, r):
        return pl.ds(segment + first, tile), slice(None), r

    if isinstance(x, Gated):
        (ref,) = refs

        def read_gated(m, first, tile, r, tile_layout):
            def total(half):
                where = (first_row + m, half, *places(first, tile, r))
                parts = [load(ref.at[(s, *where)], tile_layout) for s in range(ref.shape[0])]
                return functools.reduce(jnp.add, parts)

            return gated(total(0), total(1), x.dtype)

        return read_gated
    if isinstance(x, Normed):
        ref, scale_ref, whole_ref = refs
        factors = [
            inverse_root_mean_square(whole_ref, first_row + m, layout.k, x.epsilon)
            for m in range(rows)
        ]

        def read_normed(m, first, tile, r, tile_layout):
            where = places(first, tile, r)
            y = load(ref.at[(first_row + m, *where)], tile_layout).astype(jnp.float32)
            y = y * factors[m] * load(scale_ref.at[where], tile_layout).astype(jnp.float32)
            return y.astype(x.dtype).astype(jnp.float32)

        return read_normed
    (ref,) = refs

    def read(m, first, tile, r, tile_layout):
        where = (first_row + m, *places(first, tile, r))
        return load(ref.at[where], tile_layout).astype(jnp.float32)

    return read
