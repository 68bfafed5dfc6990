"""8-bit floats as words, and small floats read as the high bits of a float32.

A float of few bits becomes a float32 by moving bits: its sign to bit 31, the lowest bit of its
exponent to bit 23, its mantissa below. The exponents then differ by a constant, and subnormals are
right by themselves, because they are the float32's subnormals as well. What is missing is a power
of two (2^-120 for e4m3, 2^-112 for e5m2, 2^-126 for e2m1) that the finished sum makes up for.
Formats have no infinities or NaN: the bits of those read as the next numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.word_formats import STAGED_EXPONENT, WordFormat, shift_right

FLOAT16_EXPONENT = 112
"""The exponents of float32 and float16 differ by this."""


def as_int32(bits: int) -> int:
    """The int32 whose bits are those of an unsigned number."""
    return bits - (1 << 32) if bits >> 31 else bits


def shift_left(word: jax.Array, bits: int) -> jax.Array:
    """``word << bits``, as it is for 0."""
    return word << jnp.int32(bits) if bits else word


def copy_sign_right(word: jax.Array, bits: int) -> jax.Array:
    """Arithmetic ``word >> bits``: the sign stays, everything else moves."""
    return lax.shift_right_arithmetic(word, jnp.full_like(word, bits)) if bits else word


def small_float(bits: jax.Array, interpreted: bool) -> jax.Array:
    """int32 bits of a float32 whose exponent field is below 31 -> that number.

    Times 2^112 if interpreted: XLA on CPU flushes subnormals of float32, not of float16, and these
    bits have at most 3 of mantissa, so that the float16 with the same exponent field is exact.
    """
    if not interpreted:
        return lax.bitcast_convert_type(bits, jnp.float32)
    sign = shift_right(bits, 16) & jnp.int32(0x8000)
    magnitude = shift_right(bits, 13) & jnp.int32(0x7FFF)
    half = lax.bitcast_convert_type((sign | magnitude).astype(jnp.uint16), jnp.float16)
    return half.astype(jnp.float32)


def small_float_exponents(rows: int, interpreted: bool) -> tuple[int, ...]:
    """`WordFormat.exponents` of a format of small floats."""
    return (0 if interpreted else STAGED_EXPONENT,) * rows


def small_float_exponent(exponent_bits: int, interpreted: bool) -> int:
    """`WordFormat.exponent` of a format of small floats with IEEE's bias of the exponent."""
    missing = 127 - (2 ** (exponent_bits - 1) - 1)
    return missing - (FLOAT16_EXPONENT if interpreted else STAGED_EXPONENT)


@dataclasses.dataclass(frozen=True)
class Float8Words(WordFormat):
    """Four consecutive rows of 8-bit floats in a word, the first in the lowest byte.

    A byte is shifted to the top, then down again by the exponent bits it lacks, which copies the
    sign, then masked: 3 instructions, 2 for the highest byte.
    """

    exponent_bits: int = 4

    def exponents(self, interpreted: bool) -> tuple[int, ...]:
        """The same for all rows."""
        return small_float_exponents(self.rows, interpreted)

    def exponent(self, interpreted: bool) -> int:
        """Makes up for the exponent's bias."""
        return small_float_exponent(self.exponent_bits, interpreted)

    def place(self, words: Sequence[jax.Array]) -> list[jax.Array]:
        """Words of a unit -> int32 bits of the float32 of each row."""
        (word,) = words
        down = 8 - self.exponent_bits
        mask = jnp.int32(as_int32(1 << 31 | 0x7F << (24 - down)))
        return [
            copy_sign_right(shift_left(word, 24 - 8 * byte), down) & mask for byte in range(4)
        ]

    def decode(
        self, words: Sequence[jax.Array], columns: Sequence[jax.Array], interpreted: bool
    ) -> list[jax.Array]:
        """Bits in place, read as float32."""
        return [small_float(bits, interpreted) for bits in self.place(words)]


FORMATS: tuple[WordFormat, ...] = (
    Float8Words(name="float8_e4m3", words=1, rows=4, exponent_bits=4),
    Float8Words(name="float8_e5m2", words=1, rows=4, exponent_bits=5),
    Float8Words(name="mxfp8", words=1, rows=4, exponent_bits=4),
)
