"""Codes that are indices into a table, as words: nf4."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import lane_instructions as lanes
from pallas_kernels.mosaic import mma_instructions as mma
from pallas_kernels.weights.nf4_levels import NF4_LEVELS
from pallas_kernels.weights.word_format import (
    Arrays,
    NamedArrays,
    Rows,
    Storage,
    WordFormat,
    shift_right,
)

_SUPER_COLUMNS = 256  # columns that share the scale of a scale


@dataclasses.dataclass(frozen=True)
class CodebookWords(WordFormat):
    """Eight consecutive rows of 4-bit codes in a word, each an index into 16 float32 levels.

    The table lies across the warp: every lane holds one level in a register, the upper 16 lanes
    the same as the lower 16, and a code is decoded by one shuffle from the lane that it names.
    A shuffle looks at the lowest 5 bits of the index only, so that a nibble needs no mask: what
    stands above it does not matter. Levels come out exactly. Shuffles run at 32 a clock and SM on
    every GPU, which is what bounds these formats.
    """

    levels: tuple[float, ...] = ()

    def decode(self, words: Arrays, columns: Arrays, interpreted: bool, layout: Any = None) -> Rows:
        """A shift and a shuffle a row."""
        (word,) = words
        if interpreted:
            return [self._select(shift_right(word, 4 * row)) for row in range(8)]

        def emit(word):
            table = lanes.lane_table(self.levels)
            return [lanes.read_lane(table, lanes.shift_right(word, 4 * row)) for row in range(8)]

        return lanes.apply(emit, [word], [jnp.float32] * 8, layout)

    def _select(self, index: jax.Array) -> jax.Array:
        """The level that the lowest 4 bits name."""
        values = [jnp.full(index.shape, level, jnp.float32) for level in self.levels]
        for bit in range(4):
            is_set = (index & jnp.int32(1 << bit)) != 0
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [jnp.where(is_set, high, low) for low, high in pairs]
        return values[0]

    @property
    def paired_rows(self) -> tuple[tuple[int, int], ...] | None:
        """Neighbours."""
        return tuple((row, row + 1) for row in range(0, 8, 2))

    def fragments(
        self, words: Sequence[Any], columns: Sequence[Any], offset: Any, dtype: Any
    ) -> list[list[Any]]:
        """A shift and a shuffle a row, which fetch a level as the sum of two 16-bit floats."""
        high = np.asarray(self.levels, np.float32).astype(dtype)
        low = (np.asarray(self.levels, np.float32) - high.astype(np.float32)).astype(dtype)
        both = low.view(np.uint16).astype(np.uint32) << 16 | high.view(np.uint16)
        table = lanes.lane_words([int(word) for word in both.view(np.int32)])
        rows = [lanes.read_lane(table, lanes.shift_right(words[0], 4 * row)) for row in range(8)]
        pairs = list(zip(rows[::2], rows[1::2], strict=True))
        return [[mma.permute(*pair, order) for pair in pairs] for order in (0x5410, 0x7632)]

    def merged_scale(self, arrays: NamedArrays, n: int) -> tuple[jax.Array, NamedArrays]:
        """Of scales that are codes themselves (double quantization) what they stand for."""
        names = ("scale", "super_scale", "scale_offset")
        if "super_scale" not in arrays:
            return super().merged_scale(arrays, n)
        kept = {name: arrays[name] for name in names}
        scale, step, offset = kept.values()
        wide = jnp.broadcast_to(step[..., None], (*step.shape, _SUPER_COLUMNS))
        wide = wide.reshape(*step.shape[:-1], -1)[..., :n]
        return scale.astype(jnp.float32) * wide + offset, kept


FORMATS: tuple[WordFormat, ...] = (
    CodebookWords(
        name="nf4",
        words=1,
        rows=8,
        levels=NF4_LEVELS,
        terms=2,
        storages=(Storage("NF4 groups of 64", group_size=64),),
    ),
)
