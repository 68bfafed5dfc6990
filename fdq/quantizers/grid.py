"""The levels that each weight of a matrix may take, once its scales are chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats import Arrays, ScaledFormat, grouping
from fdq.quantizers.clip_search import SLAB_WEIGHTS, searched
from fdq.quantizers.quantizer import by_slabs, format_of
from fdq.schemes.scheme import WeightSpec


class Grid(NamedTuple):
    """Scale and, where the format has them, zero point and offset of rows: float32 `[rows, N]`."""

    scale: jax.Array
    zero: Any = None
    offset: Any = None

    @classmethod
    def of(cls, parameters: Arrays, spec: WeightSpec, shape: tuple[int, ...]) -> Grid:
        """Of a whole matrix, from the parameters that are stored."""
        format = format_of(spec)
        assert isinstance(format, ScaledFormat)

        def wide(a: jax.Array) -> jax.Array:
            a = grouping.expand(a.astype(jnp.float32), spec, shape[0], shape[1])
            return jnp.broadcast_to(a, shape)

        zero, offset = (parameters.get(name) for name in ("zero", "offset"))
        return cls(
            wide(format.multiplier(parameters, spec)),
            None if zero is None else wide(zero),
            None if offset is None else wide(offset),
        )

    def rows(self, start: Any, count: int) -> Grid:
        """Those of `count` rows from `start`."""
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count), self)

    def row(self, at: Any) -> Grid:
        """Those of one row, `[N]`."""
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, keepdims=False), self)

    def level(self, w: jax.Array, spec: WeightSpec) -> jax.Array:
        """The level nearest to each weight of these rows."""
        format = format_of(spec)
        assert isinstance(format, ScaledFormat)
        above = w if self.offset is None else w - self.offset
        return format.project(above / self.scale, spec, self.zero)

    def value(self, level: jax.Array) -> jax.Array:
        """What a level stands for."""
        return level * self.scale if self.offset is None else level * self.scale + self.offset

    def nearest(self, w: jax.Array, spec: WeightSpec) -> jax.Array:
        """What the level nearest to each weight stands for."""
        return self.value(self.level(w, spec))


def fitted(w: jax.Array, spec: WeightSpec, mean_square: jax.Array) -> Arrays:
    """Parameters of a float32 weight `[K, N]`: of least squared error weighted by the mean square.

    Where the format has no scales to try, those of its closed form.
    """
    format = format_of(spec)
    assert isinstance(format, ScaledFormat)
    if not format.searchable:
        return format.finish(format.fit(w, spec), spec)
    slabs = -(-w.size // SLAB_WEIGHTS) if format.columns_apart(spec) else 1
    slabs = min(w.shape[1], slabs)
    if slabs == 1:
        return searched(w, spec, importance=mean_square)
    return by_slabs(w, slabs, lambda slab: searched(slab, spec, importance=mean_square))
