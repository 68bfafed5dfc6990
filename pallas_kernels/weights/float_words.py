"""Small floats as words: e4m3, e5m2 and the e2m1 of mxfp4 and nvfp4.

A float of few bits becomes a float32 by moving bits: its sign to bit 31, the lowest bit of its
exponent to bit 23, its mantissa below. The exponents then differ by a constant, and subnormals are
right by themselves, because they are the float32's subnormals as well. What is missing is a power
of two (2^-120 for e4m3, 2^-112 for e5m2, 2^-126 for e2m1) that the finished sum makes up for.
Formats have no infinities or NaN: the bits of those read as the next numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import lane_instructions as lanes
from pallas_kernels.mosaic import mma_instructions as mma
from pallas_kernels.weights.word_format import (
    STAGED_EXPONENT,
    Arrays,
    Rows,
    Storage,
    WordFormat,
    bytes_to_words,
    per_channel,
    shift_right,
)

FLOAT16_EXPONENT = 112
"""The exponents of float32 and float16 differ by this."""


@dataclasses.dataclass(frozen=True)
class SmallFloatWords(WordFormat):
    """Rows that are small floats, each `((word << left) >> right) & mask` of the one word.

    The right shift copies the sign, which stays in bit 31 when the rest moves.
    """

    shifts: tuple[tuple[int, int], ...] = ()  # left and right, for each row
    exponent_bits: int = 0  # of the small float, whose exponents have IEEE's bias
    mantissa_bits: int = 0

    @property
    def mask(self) -> int:
        """Sign, exponent and mantissa in a float32, as an int32."""
        magnitude = (1 << self.exponent_bits + self.mantissa_bits) - 1
        return (magnitude << 23 - self.mantissa_bits) - (1 << 31)

    def exponents(self, interpreted: bool) -> tuple[int, ...]:
        """The same for all rows."""
        return (0 if interpreted else STAGED_EXPONENT,) * self.rows

    def exponent(self, interpreted: bool) -> int:
        """Makes up for the exponent's bias."""
        missing = 127 - (2 ** (self.exponent_bits - 1) - 1)
        return missing - (FLOAT16_EXPONENT if interpreted else STAGED_EXPONENT)

    def decode(self, words: Arrays, columns: Arrays, interpreted: bool, layout: Any = None) -> Rows:
        """At most two shifts and a mask a row."""
        (word,) = words
        if interpreted:
            return [from_float32_bits(bits) for bits in self.place(word)]

        def emit(word):
            return [lanes.as_float(bits) for bits in self.place(lanes.Word(word))]

        return lanes.apply(emit, [word], [jnp.float32] * self.rows, layout)

    @property
    def paired_rows(self) -> tuple[tuple[int, int], ...] | None:
        """Bytes of both halves."""
        return (0, 2), (1, 3)

    def fragment_exponent(self, dtype: Any) -> int:
        """Of float16 that of the exponents' bias; bfloat16 is multiplied by it, as its products
        would be smaller than a float32.
        """
        return 0 if dtype == jnp.bfloat16 else (1 << self.exponent_bits - 1) - 16

    def moves(self, mantissa_bits: int) -> list[list[tuple[int, int]]]:
        """For each pair of rows the shifts and masks (see `mma_instructions.moved`) that make
        16-bit floats with so many bits of mantissa of it.
        """
        up = mantissa_bits - self.mantissa_bits
        bits = (1 << self.exponent_bits + self.mantissa_bits) - 1 << up
        return [[(8, 0x8000), (up, bits)], [(0, 0x8000), (up - 8, bits)]]

    def fragments(
        self, words: Sequence[Any], columns: Sequence[Any], offset: Any, dtype: Any
    ) -> list[list[Any]]:
        """Bits put in their places, and of bfloat16 a product with a power of two."""
        wide = dtype == jnp.bfloat16
        pairs = [mma.moved(words[0], moves) for moves in self.moves(7 if wide else 10)]
        if wide:
            factor = mma.power_pair(128 - (1 << self.exponent_bits - 1), dtype)
            pairs = [mma.multiply_add(pair, factor, None, dtype) for pair in pairs]
        return [pairs]

    def place(self, word: Any) -> list[Any]:
        """int32 bits of the float32 of each row; of anything with the operators of an int32."""
        return [self._shifted(word, left, right) & self.mask for left, right in self.shifts]

    @staticmethod
    def _shifted(word: Any, left: int, right: int) -> Any:
        word = word << left if left else word
        return word >> right if right else word


def from_float32_bits(bits: jax.Array) -> jax.Array:
    """int32 bits of a float32 whose exponent field is below 31 -> 2^112 times that number.

    XLA on CPU flushes subnormals of float32 to zero, those of float16 it keeps; a float16 with the
    same exponent field is 2^112 times larger, and these bits have at most 3 of mantissa.
    """
    sign = shift_right(bits, 16) & jnp.int32(0x8000)
    magnitude = shift_right(bits, 13) & jnp.int32(0x7FFF)
    half = lax.bitcast_convert_type((sign | magnitude).astype(jnp.uint16), jnp.float16)
    return half.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Float4Words(SmallFloatWords):
    """Eight rows of e2m1 in a word, their bits placed so that a row costs two instructions.

    A float32 with e2m1's bits has the sign in bit 31, the exponent in bits 24 and 23, the mantissa
    in bit 22. Six rows lie so that a left shift by `shifts` and a mask put their bits there. No
    more than six such rows fit into a word; what they leave free is, twice, two bits, a gap of one,
    and two bits. A shuffle looks at the lowest 5 bits of its index, so that these rows are looked
    up across the warp after one shift (see `codebook_words`): lane i holds what the bits 0, 1, 3
    and 4 of i stand for, whatever bit 2 is, which belongs to another row. `pack` moves the bits of
    the canonical codes to these places.
    """

    shifts: tuple[tuple[int, int], ...] = ((0, 0), (3, 0), (6, 0), (16, 0), (19, 0), (22, 0))
    indices: tuple[int, ...] = (10, 26)
    exponent_bits: int = 2
    mantissa_bits: int = 1

    @property
    def places(self) -> list[tuple[int, ...]]:
        """For each row, where the four bits of its code are, the sign last."""
        masked = [(22 - left, 23 - left, 24 - left, 31 - left) for left, _ in self.shifts]
        return masked + [(first, first + 1, first + 3, first + 4) for first in self.indices]

    def index_bits(self, index: Any) -> Any:
        """int32 bits of the float32 that a shuffle's index stands for; of arrays and numbers."""
        magnitude = (index & 3) << 22 | (index & 8) << 21
        return magnitude | (index & 16) << 27

    @property
    def lane_values(self) -> list[float]:
        """float32 numbers of the 32 lanes."""
        lanes_ = np.arange(32, dtype=np.int32)
        return [float(value) for value in self.index_bits(lanes_).view(np.float32)]

    def decode(self, words: Arrays, columns: Arrays, interpreted: bool, layout: Any = None) -> Rows:
        """A shift and a mask, or a shift and a shuffle, a row."""
        (word,) = words
        if interpreted:
            looked_up = [self.index_bits(shift_right(word, first)) for first in self.indices]
            return [from_float32_bits(bits) for bits in self.place(word) + looked_up]

        def emit(word):
            table = lanes.lane_table(self.lane_values)
            masked = [lanes.as_float(bits) for bits in self.place(lanes.Word(word))]
            indices = [lanes.shift_right(word, first) for first in self.indices]
            return masked + [lanes.read_lane(table, index) for index in indices]

        return lanes.apply(emit, [word], [jnp.float32] * self.rows, layout)

    @property
    def paired_rows(self) -> tuple[tuple[int, int], ...] | None:
        """Rows whose bits are 16 apart."""
        return (3, 0), (4, 1), (5, 2), (6, 7)

    def moves(self, mantissa_bits: int) -> list[list[tuple[int, int]]]:
        """Three masks, and for the rows that the words' layout has for shuffles three parts."""
        up = mantissa_bits - 7  # of bfloat16 the first pair is in place
        magnitude = 0x1C0 << up
        masked = [
            [(left, 0x8000 | magnitude)] if up == 0 else [(left, 0x8000), (left + up, magnitude)]
            for left in (0, 3, 6)
        ]
        low, high = 0xC0 << up, 0x100 << up
        return [*masked, [(1, 0x8000), (up - 4, low), (up - 5, high)]]

    def pack(self, codes: jax.Array) -> jax.Array:
        """Moves the bits of every row to their places."""
        stream = lax.bitcast_convert_type(bytes_to_words(codes), jnp.uint32)
        word = jnp.zeros_like(stream)
        for bit, place in enumerate(sum(self.places, ())):
            word = word | (stream >> jnp.uint32(bit) & jnp.uint32(1)) << jnp.uint32(place)
        return lax.bitcast_convert_type(word, jnp.int32)

    def unpack(self, words: jax.Array, dtype: str = "uint8") -> jax.Array:
        """Moves them back."""
        word = lax.bitcast_convert_type(words, jnp.uint32)
        stream = jnp.zeros_like(word)
        for bit, place in enumerate(sum(self.places, ())):
            stream = stream | (word >> jnp.uint32(place) & jnp.uint32(1)) << jnp.uint32(bit)
        return super().unpack(lax.bitcast_convert_type(stream, jnp.int32), dtype)


@dataclasses.dataclass(frozen=True)
class GlobalScaleWords(Float4Words):
    """Scales of groups of which one more float32 is shared by the whole weight."""

    column_scale: str | None = "global_scale"

    @property
    def scaled_fragments(self) -> bool:
        """e4m3 times e2m1 has 5 bits."""
        return True

    def fragment_exponent(self, dtype: Any) -> int:
        """That of scales (see `mma_instructions.e4m3_scales`) and, in float16, of codes."""
        return -8 if dtype == jnp.bfloat16 else super().fragment_exponent(dtype)

    def fragments(
        self, words: Sequence[Any], columns: Sequence[Any], offset: Any, dtype: Any
    ) -> list[list[Any]]:
        """Bits put in their places, times the scale."""
        pairs = [mma.moved(words[0], m) for m in self.moves(7 if dtype == jnp.bfloat16 else 10)]
        return [[mma.multiply_add(pair, offset, None, dtype) for pair in pairs]]

    def extra_shapes(self, n: int) -> dict[str, tuple[int, int]]:
        """One number."""
        return {"global_scale": (1, 1)}


def _float8(name: str, exponent_bits: int, *storages: Storage) -> SmallFloatWords:
    """Four consecutive rows in a word, the first in the lowest byte: 3 instructions each, or 2."""
    # The sign stays in place, the byte's other 7 bits go from bit 30 down to the exponent's.
    right = 8 - exponent_bits
    return SmallFloatWords(
        name=name,
        words=1,
        rows=4,
        shifts=tuple((left, right) for left in (24, 16, 8, 0)),
        exponent_bits=exponent_bits,
        mantissa_bits=7 - exponent_bits,
        storages=storages,
    )


_E4M3: dict[str, Any] = {"code_dtype": "float8_e4m3fn"}
_NVFP4: dict[str, Any] = {"group_size": 16, "scale_dtype": "float8_e4m3fn"}
_BLOCKS: dict[str, Any] = {"block_size": (128, 128), "scale_dtype": "float32"}
_E8M0: dict[str, Any] = {"group_size": 32, "scale_dtype": "float8_e8m0fnu"}

FORMATS: tuple[WordFormat, ...] = (
    _float8(
        "float8_e4m3",
        4,
        per_channel("fp8 per channel", **_E4M3),
        Storage("fp8 blocks of 128", granularity="block", **_BLOCKS, **_E4M3),
    ),
    _float8("float8_e5m2", 5),
    Float4Words(name="mxfp4", words=1, rows=8, storages=(Storage("MXFP4", **_E8M0),)),
    GlobalScaleWords(name="nvfp4", words=1, rows=8, storages=(Storage("NVFP4", **_NVFP4),)),
    _float8("mxfp8", 4, Storage("MXFP8", **_E8M0, **_E4M3)),
)
