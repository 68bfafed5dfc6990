"""Integers as words: codes of 8, 4, 3 and 2 bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import mma_instructions as mma
from pallas_kernels.weights.word_format import (
    SIGN_BITS,
    Arrays,
    LinearWords,
    Rows,
    Storage,
    WordFormat,
    bytes_to_words,
    linear_bits,
    linear_field,
    per_channel,
    shift_right,
)


@dataclasses.dataclass(frozen=True)
class IntegerWords(LinearWords):
    """Codes that are numbers; of a power of two of bits consecutive rows, the first lowest.

    Signed int8 codes become offset binary, so that every code is an unsigned field. Four-byte dots
    read the same words: `w >> i * bits` masked to the low `bits` of each byte holds the rows
    `i, i + 8 / bits, ...`.
    """

    def bias(self, zero_point: str) -> float:
        """The middle of the codes; half a step less for `half`, 0 where zeros are stored."""
        middle = 2.0 ** (self.bits - 1)
        return {"none": middle, "half": middle - 0.5, "integer": 0.0}[zero_point]

    @property
    def positions(self) -> list[int]:
        """After the shift."""
        return [position for _, position in self._fields]

    @property
    def _fields(self) -> list[tuple[int, int]]:
        """For each row, the shift of the word and the position of the field after it."""
        positions = range(0, 32, self.bits)
        shift = 24 if self.bits == 8 else 8
        return [(0, p) if p + self.bits <= 24 else (shift, p - shift) for p in positions]

    def decode(self, words: Arrays, columns: Arrays, interpreted: bool, layout: Any = None) -> Rows:
        """One mask a row, and one shift a word."""
        (word,) = words
        shifts = {shift for shift, _ in self._fields}
        moved = {shift: shift_right(word, shift) if shift else word for shift in shifts}
        rows = []
        for shift, position in self._fields:
            if shift + self.bits == 32:  # the shift has left nothing else
                rows.append(linear_bits(moved[shift], interpreted))
            else:
                rows.append(linear_field(moved[shift], position, self.bits, interpreted))
        return rows

    def pack(self, codes: jax.Array) -> jax.Array:
        """As the stream is; int8 becomes offset binary."""
        words = bytes_to_words(codes)
        return words ^ jnp.int32(SIGN_BITS) if codes.dtype == jnp.int8 else words

    def unpack(self, words: jax.Array, dtype: str = "uint8") -> jax.Array:
        """Undoes `pack`."""
        return super().unpack(words ^ jnp.int32(SIGN_BITS) if dtype == "int8" else words, dtype)

    @property
    def byte_rows(self) -> tuple[tuple[int, int, int, int], ...] | None:
        """Every `8 / bits`-th row."""
        step = 8 // self.bits
        return tuple((i, i + step, i + 2 * step, i + 3 * step) for i in range(step))

    @property
    def paired_rows(self) -> tuple[tuple[int, int], ...] | None:
        """Fields at the same place of both halves of the word."""
        half = self.rows // 2
        return tuple((i, i + half) for i in range(half))

    def fragment_exponent(self, dtype: Any) -> int:
        """That of fields."""
        return mma.field_exponent(dtype)

    def fragments(
        self, words: Sequence[Any], columns: Sequence[Any], offset: Any, dtype: Any
    ) -> list[list[Any]]:
        """A mask and a multiply-add for two rows, a shift for eight bits."""
        return [mma.fields(words[0], range(0, 16, self.bits), self.bits, offset, dtype)]

    def signed_planes(self, word: jax.Array) -> list[jax.Array]:
        """The code's bits go to the top of each byte, and its highest is flipped: two's complement.

        Bits that a shift carries into the next byte are masked.
        """
        if self.bits == 8:
            return [word ^ jnp.int32(SIGN_BITS)]
        top = 256 - (1 << (8 - self.bits))
        mask = int.from_bytes(bytes([top] * 4), "little", signed=True)
        planes = []
        for i in range(8 // self.bits):
            shift = 8 - self.bits * (i + 1)
            moved = word << jnp.full_like(word, shift) if shift else word
            planes.append((moved & jnp.int32(mask)) ^ jnp.int32(SIGN_BITS))
        return planes


@dataclasses.dataclass(frozen=True)
class ThreeBitWords(IntegerWords):
    """Codes of 3 bits as one stream: 32 consecutive rows in three words.

    Ten rows of a word are fields of it; rows 10 and 21 lie in two words each and are put together
    by three instructions. They fill no bytes.
    """

    _starts = (0, 1, 2)  # bit of a word's first whole field

    @property
    def byte_rows(self) -> None:
        """None."""

    @property
    def positions(self) -> list[int]:
        """After the shift; 0 of what is put together."""
        positions = []
        for start in self._starts:
            fields = range(start, start + 30, 3)
            positions += [p if p <= 21 else p - 8 for p in fields] + [0]
        return positions[:-1]

    def decode(self, words: Arrays, columns: Arrays, interpreted: bool, layout: Any = None) -> Rows:
        """One mask a row, one shift a word, and the two rows between words."""
        rows = []
        for i, (word, start) in enumerate(zip(words, self._starts, strict=True)):
            shifted = shift_right(word, 8)
            for position in range(start, start + 30, 3):
                source, at = (word, position) if position <= 21 else (shifted, position - 8)
                rows.append(linear_field(source, at, 3, interpreted))
            if i < 2:
                low = shift_right(word, 30 + i)
                high = words[i + 1] << jnp.int32(2 - i)
                between = low | (high & jnp.int32(7 & -(4 >> i)))
                rows.append(linear_bits(between, interpreted))
        return rows

    @property
    def paired_rows(self) -> tuple[tuple[int, int], ...] | None:
        """Fields that lie at the same place in halves of two words, then those across halves."""
        first = [(i, 16 + i) for i in range(5)]  # the lower half of word 0, the upper of word 1
        second = [(6 + i, 22 + i) for i in range(4)]  # the upper of 0, the lower of 2
        third = [(11 + i, 27 + i) for i in range(5)]  # the lower of 1, the upper of 2
        return (*first, *second, *third, (5, 26), (10, 21))

    def fragments(
        self, words: Sequence[Any], columns: Sequence[Any], offset: Any, dtype: Any
    ) -> list[list[Any]]:
        """As the others', of words with one half from each of two."""
        a, b, c = words
        merged = [
            (mma.permute(a, b, 0x7610), range(0, 15, 3)),
            (mma.permute(a, c, 0x5432), range(2, 14, 3)),
            (mma.permute(b, c, 0x7610), range(1, 16, 3)),
            (mma.permute(mma.shifted(a, -15), mma.shifted(c, 2), 0x7610), (0,)),
            (mma.permute(mma.between(a, b, 30), mma.between(b, c, 31), 0x5410), (0,)),
        ]
        fields = functools.partial(mma.fields, bits=3, offset=offset, dtype=dtype)
        return [[pair for word, positions in merged for pair in fields(word, positions)]]

    def code_rows(self, k: int) -> int:
        """Whole units of 8 rows in 3 bytes."""
        return -(-k // 8) * 3


# Three FFMA and LOP3 a weight and what they share; above five, an H200 is below 74 % of its memory.
_INT4: dict[str, Any] = {"instruction_limit": 5.0}


def _group(name: str, more: str = "", **changes: Any) -> Storage:
    return Storage(f"{name} groups of 128{more}", group_size=128, **changes)


FORMATS: tuple[WordFormat, ...] = (
    IntegerWords(
        name="int8",
        words=1,
        rows=4,
        storages=(
            per_channel("int8 per channel", code_dtype="int8"),
            _group("int8", code_dtype="int8"),
        ),
    ),
    IntegerWords(
        name="int4",
        words=1,
        rows=8,
        storages=(
            _group("int4", **_INT4),
            _group("int4", ", zero points", zero_point="integer", **_INT4),
            per_channel("int4 per channel", **_INT4),
        ),
    ),
    ThreeBitWords(name="int3", words=3, rows=32, storages=(_group("int3"),)),
    IntegerWords(name="int2", words=1, rows=16, storages=(_group("int2", zero_point="half"),)),
)
