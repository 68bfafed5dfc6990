"""Keys whose channels lie in several cache tensors, each with scales of its own.

Latent attention reads such: a latent, which is its values too, and channels that are rotated.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from fdq.cache.cache_tensor import CacheTensor
from fdq.cache.format import CacheFormat
from fdq.ops.attention.sides import Side, cache_side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedKeys:
    """Stands for keys `[B, KH, S, D]`: the channels of its parts, one after the other."""

    parts: tuple[CacheTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """`[B, KH, S, D]`."""
        return (*self.parts[0].shape[:3], sum(self.widths))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each part."""
        return tuple(part.head_dim for part in self.parts)

    @property
    def format(self) -> CacheFormat:
        """Of the first part, by which it is decided how the cache is read."""
        return self.parts[0].format

    def dequantize(self) -> jax.Array:
        """The keys in float32."""
        return jnp.concatenate([part.dequantize() for part in self.parts], axis=-1)


class JoinedSide:
    """As `Side`, as far as attention reads keys: the scores of all parts, added up."""

    def __init__(self, keys: JoinedKeys, program: str, narrow: Any = None):
        self.sides = [cache_side(part, program, narrow) for part in keys.parts]
        self.ends = tuple(itertools.accumulate(keys.widths))[:-1]
        self.chunked = self.sides[0].chunked
        self.lies_as_read = all(side.lies_as_read for side in self.sides)
        # These depend on the program and the number of slots alone.
        first = self.sides[0]
        self.chunks, self.kept, self.slots = first.chunks, first.kept, first.slots
        self.seen_below = first.seen_below

    def block(self, size: int, rows: int) -> int:
        """As `Side.block`."""
        return min(side.block(size, rows) for side in self.sides)

    def scaled(self, x: jax.Array) -> jax.Array:
        """Queries times static scales."""
        pairs = zip(self.sides, self._cut(x), strict=True)
        return jnp.concatenate([side.scaled(part) for side, part in pairs], axis=-1)

    def rows(self, x: jax.Array) -> Any:
        """Of each part the rows that it multiplies, and the sums of its channels."""
        pairs = zip(self.sides, self._cut(x), strict=True)
        return [(side.rows(part), jnp.sum(part, axis=-1, keepdims=True)) for side, part in pairs]

    def dots(self, queries: Any, start: Any, size: int) -> jax.Array:
        """The scores of a block, finished: zero points and scales differ from part to part."""
        scores = []
        for side, (rows, total) in zip(self.sides, queries, strict=True):
            found = side.dots(rows, start, size)
            scores.append(side.finish_scores(found, total, start, size))
        return functools.reduce(jnp.add, scores)

    def finish_scores(self, scores: jax.Array, query_sum: Any, start: Any, size: int) -> jax.Array:
        """Nothing is left to do."""
        del query_sum, start, size
        return scores

    def left_in(self, queries: jax.Array) -> jax.Array | None:
        """As `Side.left_in`: what all parts leave."""
        pairs = zip(self.sides, self._cut(queries), strict=True)
        found = [left for side, part in pairs if (left := side.left_in(part)) is not None]
        return functools.reduce(jnp.add, found) if found else None

    def _cut(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(x, self.ends, axis=-1)


def side_of(keys: CacheTensor | JoinedKeys, program: str, narrow: Any = None) -> Side | JoinedSide:
    """Keys as attention reads them."""
    if isinstance(keys, JoinedKeys):
        return JoinedSide(keys, program, narrow)
    return cache_side(keys, program, narrow)
