"""4-bit codes that are not integers, as words: e2m1 (of mxfp4 and nvfp4) and nf4."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import lane_instructions
from pallas_kernels.float_words import (
    as_int32,
    copy_sign_right,
    shift_left,
    small_float,
    small_float_exponent,
    small_float_exponents,
)
from pallas_kernels.word_formats import (
    WordFormat,
    bytes_to_words,
    shift_right,
    words_to_bytes,
)

NF4_LEVELS = tuple(
    float(np.float32(level))
    for level in (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
"""float32 levels of NF4 as bitsandbytes ships them (QLoRA, arXiv 2305.14314, appendix E)."""


@dataclasses.dataclass(frozen=True)
class Float4Words(WordFormat):
    """Eight rows of e2m1 in a word, their bits placed so that a row costs few instructions.

    A float32 with e2m1's bits has the sign in bit 31, the exponent in bits 24 and 23, the mantissa
    in bit 22. Row r is ``((word << left) >> right) & mask``, the right shift copying the sign, with
    the shifts below: an exhaustive search found no eight places that need fewer instructions (19)
    and overlap nowhere. `pack` moves the bits of the canonical codes there.
    """

    SHIFTS = ((0, 0), (6, 0), (16, 0), (22, 0), (1, 6), (5, 2), (17, 6), (21, 2))
    MASK = 0x81C00000

    def exponents(self, interpreted: bool) -> tuple[int, ...]:
        """The same for all rows."""
        return small_float_exponents(self.rows, interpreted)

    def exponent(self, interpreted: bool) -> int:
        """Makes up for the exponent's bias."""
        return small_float_exponent(2, interpreted)

    def place(self, words: Sequence[jax.Array]) -> list[jax.Array]:
        """Words of a unit -> int32 bits of the float32 of each row."""
        (word,) = words
        mask = jnp.int32(as_int32(self.MASK))
        return [
            copy_sign_right(shift_left(word, left), right) & mask for left, right in self.SHIFTS
        ]

    def decode(
        self, words: Sequence[jax.Array], columns: Sequence[jax.Array], interpreted: bool
    ) -> list[jax.Array]:
        """Bits in place, read as float32."""
        return [small_float(bits, interpreted) for bits in self.place(words)]

    def pack(self, codes: jax.Array) -> jax.Array:
        """Moves sign and magnitude of every row to their places."""
        stream = lax.bitcast_convert_type(bytes_to_words(codes), jnp.uint32)
        word = jnp.zeros_like(stream)
        for row, (left, right) in enumerate(self.SHIFTS):
            code = stream >> jnp.uint32(4 * row)
            word = word | (code & jnp.uint32(7)) << jnp.uint32(22 + right - left)
            word = word | (code >> jnp.uint32(3) & jnp.uint32(1)) << jnp.uint32(31 - left)
        return lax.bitcast_convert_type(word, jnp.int32)

    def unpack(self, words: jax.Array) -> jax.Array:
        """Moves them back."""
        word = lax.bitcast_convert_type(words, jnp.uint32)
        stream = jnp.zeros_like(word)
        for row, (left, right) in enumerate(self.SHIFTS):
            magnitude = word >> jnp.uint32(22 + right - left) & jnp.uint32(7)
            sign = word >> jnp.uint32(31 - left) & jnp.uint32(1)
            stream = stream | (magnitude | sign << jnp.uint32(3)) << jnp.uint32(4 * row)
        return words_to_bytes(lax.bitcast_convert_type(stream, jnp.int32))


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

    def decode(
        self, words: Sequence[jax.Array], columns: Sequence[jax.Array], interpreted: bool
    ) -> list[jax.Array]:
        """A shift and a shuffle a row."""
        (word,) = words
        if interpreted:
            return [self._select(shift_right(word, 4 * row)) for row in range(8)]

        def emit(word):
            table = lane_instructions.lane_table(self.levels)
            return [
                lane_instructions.read_lane(table, lane_instructions.shift_right(word, 4 * row))
                for row in range(8)
            ]

        return lane_instructions.apply(emit, [word], [jnp.float32] * 8)

    def _select(self, index: jax.Array) -> jax.Array:
        """The level that the lowest 4 bits name."""
        values = [jnp.full(index.shape, level, jnp.float32) for level in self.levels]
        for bit in range(4):
            is_set = (index & jnp.int32(1 << bit)) != 0
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [jnp.where(is_set, high, low) for low, high in pairs]
        return values[0]


FORMATS: tuple[WordFormat, ...] = (
    CodebookWords(name="nf4", words=1, rows=8, levels=NF4_LEVELS),
    Float4Words(name="mxfp4", words=1, rows=8),
    Float4Words(name="nvfp4", words=1, rows=8),
)
