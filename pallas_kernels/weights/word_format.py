"""Quantized weights as 32-bit words, and what a kernel does to read them.

A column of a weight is a sequence of *units*: the smallest whole number of int32 words that holds
whole codes. `WordFormat.decode` turns the words of a unit into one float32 array for each of its
rows, and that is all that a matrix kernel knows of a format::

    sum_k weight_k * x_k = 2**exponent * sum_k decoded_k * (x_k * 2**exponents[k % rows])
                           - bias * sum_k x_k

(before scales; ``bias`` where codes are offset binary). The powers of two cost nothing, the kernel
stages x once for all columns, and they are what makes decoding cheap:

**Linear bits.** Any integer below 2^24, read as the bits of a float32, *is* that integer times
2^-149: subnormals and the first binade of float32 share one step. GPU arithmetic is exact and of
full speed there. So a field of a word is decoded by one AND with a mask, without a shift or a
conversion: the field at bit p comes out as ``q * 2**(p - 149)``, and ``x * 2**(64 - p)`` undoes the
position. Fields above bit 23 are shifted down first. Numbers are safe while ``|x| < 2**60``, and
have all bits of a float32 while ``|x| > 2**-40``: products of smaller ones lose their last.

XLA on CPU flushes subnormals to zero, therefore the interpreter converts (``astype``) instead of
reinterpreting bits: the same masks, with exponents that differ by a constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LINEAR_EXPONENT = 149
"""Bits of an integer below 2^24, read as a float32, are the integer times 2^-149."""

SIGN_BITS = -0x7F7F7F80
"""The highest bit of each byte of a word, 0x80808080: what signed bytes are offset by."""

STAGED_EXPONENT = 64
"""Staged x is this many powers of two larger, so that products are normal numbers."""


@dataclasses.dataclass(frozen=True)
class WordFormat:
    """One weight format in words; formats with their own decoding override methods.

    Attributes:
      name: of the format, as in a QTensor's spec.
      words: int32 words of a unit.
      rows: rows of K of a unit; divides 128.
      columns: names of float32 constants of a column that decoding needs.
    """

    name: str
    words: int
    rows: int
    columns: tuple[str, ...] = ()

    def bias(self, zero_point: str) -> float:
        """What is subtracted from every decoded value; zero_point as in a QTensor's spec."""
        return 0.0

    def exponents(self, interpreted: bool) -> tuple[int, ...]:
        """For each row of a unit, the power of two that staged x is multiplied by."""
        return (0,) * self.rows

    def exponent(self, interpreted: bool) -> int:
        """The power of two that the finished sum is multiplied by."""
        return 0

    def decode(
        self,
        words: Sequence[jax.Array],
        columns: Sequence[jax.Array],
        interpreted: bool,
        layout: Any = None,
    ) -> list[jax.Array]:
        """Words of a unit -> its rows, before bias and scale; in kernels, element by element.

        Args:
          words: `words` int32 arrays of one shape (of columns).
          columns: float32 arrays of that shape, in the order of `columns`.
          interpreted: whether XLA on CPU runs this, rather than a GPU.
          layout: of these arrays in a kernel, for formats that need instructions without a name in
            `jax.numpy`; None: arrays ``[columns]``, neighbours in one thread.

        Returns:
          `rows` float32 arrays.
        """
        raise NotImplementedError(self.name)

    def pack(self, codes: jax.Array) -> jax.Array:
        """Canonical codes -> words, in plain JAX.

        Args:
          codes: one byte an element, ``[..., B, N]``: the little-endian bit stream of each column,
            filled up to whole units. B = 4 * words * units.

        Returns:
          int32 ``[..., words * units, N]``.
        """
        return bytes_to_words(codes)

    def unpack(self, words: jax.Array) -> jax.Array:
        """The inverse of `pack`; uint8."""
        return words_to_bytes(words)

    @property
    def byte_rows(self) -> tuple[tuple[int, int, int, int], ...] | None:
        """For each array of `byte_planes`, the rows that its four bytes hold; None: there is no
        such form, and products with int8 activations decode as all others do.
        """
        return None

    def byte_planes(self, words: Sequence[jax.Array]) -> list[jax.Array]:
        """Words of a unit -> int32 arrays of four unsigned codes each, for four-byte dots."""
        raise NotImplementedError(self.name)


def bytes_to_words(codes: jax.Array) -> jax.Array:
    """Bytes (any dtype of one byte) ``[..., 4 * R, N]`` -> int32 ``[..., R, N]``, little-endian."""
    if codes.dtype != jnp.uint8:
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    *lead, rows, n = codes.shape
    parts = codes.reshape(*lead, rows // 4, 4, n).astype(jnp.uint32)
    word = parts[..., 0, :]
    for i in range(1, 4):
        word = word | (parts[..., i, :] << jnp.uint32(8 * i))
    return lax.bitcast_convert_type(word, jnp.int32)


def words_to_bytes(words: jax.Array) -> jax.Array:
    """The inverse of `bytes_to_words`; uint8."""
    *lead, rows, n = words.shape
    word = lax.bitcast_convert_type(words, jnp.uint32)
    parts = [(word >> jnp.uint32(8 * i)).astype(jnp.uint8) for i in range(4)]
    return jnp.stack(parts, axis=-2).reshape(*lead, 4 * rows, n)


def shift_right(word: jax.Array, bits: int) -> jax.Array:
    """Logical shift of int32."""
    return lax.shift_right_logical(word, jnp.full_like(word, bits))


def linear_bits(bits: jax.Array, interpreted: bool) -> jax.Array:
    """int32 in ``0 .. 2^24 - 1`` -> float32 of that integer, times 2^-149 unless interpreted."""
    if interpreted:
        return bits.astype(jnp.float32)
    return lax.bitcast_convert_type(bits, jnp.float32)


def linear_field(word: jax.Array, position: int, bits: int, interpreted: bool) -> jax.Array:
    """The field ``position .. position + bits - 1`` (at most 24) of a word as linear bits.

    Its value is the field times ``2**position``, times 2^-149 unless interpreted.
    """
    mask = ((1 << bits) - 1) << position
    return linear_bits(word & jnp.int32(mask), interpreted)


def linear_exponents(positions: Sequence[int], interpreted: bool) -> tuple[int, ...]:
    """`WordFormat.exponents` of rows whose fields are linear bits at these positions."""
    staged = 0 if interpreted else STAGED_EXPONENT
    return tuple(staged - p for p in positions)


def linear_exponent(interpreted: bool) -> int:
    """`WordFormat.exponent` of a format of linear bits."""
    return 0 if interpreted else LINEAR_EXPONENT - STAGED_EXPONENT


@dataclasses.dataclass(frozen=True)
class IntegerWords(WordFormat):
    """Codes of 8, 4 or 2 bits: ``32 / bits`` consecutive rows in a word, the first lowest.

    Signed int8 codes become offset binary, so that every code is an unsigned field. Four-byte dots
    read the same words: ``w >> i * bits`` masked to the low `bits` of each byte holds the rows
    ``i, i + 8 / bits, ...``.
    """

    bits: int = 4

    def bias(self, zero_point: str) -> float:
        """The middle of the codes; half a step less for ``half``, 0 where zeros are stored."""
        middle = 2.0 ** (self.bits - 1)
        return {"none": middle, "half": middle - 0.5, "integer": 0.0}[zero_point]

    def exponents(self, interpreted: bool) -> tuple[int, ...]:
        """Undo the position of each field."""
        return linear_exponents([position for _, position in self._fields], interpreted)

    def exponent(self, interpreted: bool) -> int:
        """That of linear bits."""
        return linear_exponent(interpreted)

    @property
    def _fields(self) -> list[tuple[int, int]]:
        """For each row, the shift of the word and the position of the field after it."""
        positions = range(0, 32, self.bits)
        shift = 24 if self.bits == 8 else 8
        return [(0, p) if p + self.bits <= 24 else (shift, p - shift) for p in positions]

    def decode(
        self,
        words: Sequence[jax.Array],
        columns: Sequence[jax.Array],
        interpreted: bool,
        layout: Any = None,
    ) -> list[jax.Array]:
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

    def unpack(self, words: jax.Array) -> jax.Array:
        """uint8, offset binary where `pack` made it so."""
        return words_to_bytes(words)

    @property
    def byte_rows(self) -> tuple[tuple[int, int, int, int], ...] | None:
        """Every ``8 / bits``-th row."""
        step = 8 // self.bits
        return tuple((i, i + step, i + 2 * step, i + 3 * step) for i in range(step))

    def byte_planes(self, words: Sequence[jax.Array]) -> list[jax.Array]:
        """The word itself, or ``8 / bits`` masks of it."""
        (word,) = words
        if self.bits == 8:
            return [word]
        mask = ((1 << self.bits) - 1) * 0x01010101
        planes = []
        for i in range(8 // self.bits):
            moved = shift_right(word, i * self.bits) if i else word
            planes.append(moved & jnp.int32(mask))
        return planes


@dataclasses.dataclass(frozen=True)
class ThreeBitWords(WordFormat):
    """Codes of 3 bits as one stream: 32 consecutive rows in three words.

    Ten rows of a word are fields of it; rows 10 and 21 lie in two words each and are put together
    by three instructions.
    """

    _starts = (0, 1, 2)  # bit of a word's first whole field

    def bias(self, zero_point: str) -> float:
        """As `IntegerWords.bias`."""
        return {"none": 4.0, "half": 3.5, "integer": 0.0}[zero_point]

    def exponents(self, interpreted: bool) -> tuple[int, ...]:
        """Undo the position of each field."""
        positions = []
        for start in self._starts:
            fields = range(start, start + 30, 3)
            positions += [p if p <= 21 else p - 8 for p in fields] + [0]
        return linear_exponents(positions[:-1], interpreted)

    def exponent(self, interpreted: bool) -> int:
        """That of linear bits."""
        return linear_exponent(interpreted)

    def decode(
        self,
        words: Sequence[jax.Array],
        columns: Sequence[jax.Array],
        interpreted: bool,
        layout: Any = None,
    ) -> list[jax.Array]:
        """One mask a row, one shift a word, and the two rows between words."""
        rows = []
        for i, (word, start) in enumerate(zip(words, self._starts, strict=True)):
            shifted = shift_right(word, 8)
            for position in range(start, start + 30, 3):
                if position <= 21:
                    rows.append(linear_field(word, position, 3, interpreted))
                else:
                    rows.append(linear_field(shifted, position - 8, 3, interpreted))
            if i < 2:
                low = shift_right(word, 30 + i)
                high = words[i + 1] << jnp.int32(2 - i)
                between = low | (high & jnp.int32(7 & -(4 >> i)))
                rows.append(linear_bits(between, interpreted))
        return rows


_ALL: tuple[WordFormat, ...] = (
    IntegerWords(name="int8", words=1, rows=4, bits=8),
    IntegerWords(name="int4", words=1, rows=8, bits=4),
    ThreeBitWords(name="int3", words=3, rows=32),
    IntegerWords(name="int2", words=1, rows=16, bits=2),
)

WORD_FORMATS: dict[str, WordFormat] = {format.name: format for format in _ALL}
"""Every format that matrix kernels read, by name."""

# The other formats: each module derives from what is above and adds its own to the table.
from pallas_kernels.weights import codebook_words, convolutional_words, float_words  # noqa: E402, F401
