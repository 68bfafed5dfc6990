"""What the words of a cache are on tensor cores: one class for each kind of code.

Codes become exact 16-bit floats by byte permutations and masks (int8: `0x6400 | code` is the
float16 `1024 + code`; int4 and float8_e4m3: bits of a float16 times a power of two), with nothing
that needs more than sm_80. A register holds two of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import mma_instructions as ptx

_MIDDLE_OF_NIBBLES = 0xA400A400  # two float16: -8 * 2^-9


@dataclasses.dataclass(frozen=True)
class Codes:
    """How 32-bit words of a cache become 16-bit floats; static.

    `interleave` are byte numbers that deal the codes of two words out to registers of one channel
    (or of several, for `registers` to take apart) of both.
    """

    head_dim: int
    per_word: ClassVar[int]  # channels
    shift: ClassVar[float] = 1.0  # what the floats are too small by
    dtype: ClassVar[Any] = jnp.float16  # of what the tensor cores multiply
    interleave: ClassVar[tuple[int, int]] = (0x5410, 0x7632)

    @property
    def width(self) -> int:
        """Words of a slot."""
        return self.head_dim // self.per_word

    @property
    def key_vector(self) -> int:
        """Neighbouring words of a key that a thread loads at once; 4 threads share a slot."""
        return min(4, self.width // 4)

    @property
    def value_vector(self) -> int:
        """Likewise of values; 8 threads share a slot."""
        return min(4, self.width // 8)

    def registers(self, word: Any, zero: Any) -> list[Any]:
        """Registers (MLIR i32) of two floats each of a word, in the order of `query`.

        `zero` is of `zero_points`, or None.
        """
        raise NotImplementedError(type(self).__name__)

    def query(self, chunks: list[list[Any]]) -> list[list[Any]]:
        """Registers of four channels of a query each, in the order of `registers` of two words."""
        return chunks

    def zero_points(self, low: Any, high: Any) -> Any:
        """For `registers`: of two vectors of one float32, what both halves lose."""
        raise NotImplementedError(type(self).__name__)

    def values(self, fields: jax.Array, zero: jax.Array | None) -> jax.Array:
        """float32 of unsigned int32 fields `[slots, D]`: what `registers` holds, in `jax.numpy`."""
        raise NotImplementedError(type(self).__name__)


class Bfloat16Codes(Codes):
    """Floats as they are."""

    per_word = 2
    dtype = jnp.bfloat16

    def registers(self, word: Any, zero: Any) -> list[Any]:
        """The word."""
        return [word]

    def values(self, fields: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Their bits."""
        return lax.bitcast_convert_type(fields.astype(jnp.uint16), self.dtype).astype(jnp.float32)


class Float16Codes(Bfloat16Codes):
    """Floats as they are."""

    dtype = jnp.float16


class Int8Codes(Codes):
    """Signed bytes."""

    per_word = 4
    interleave = (0x5140, 0x7362)

    def registers(self, word: Any, zero: Any) -> list[Any]:
        """Bytes made unsigned, into the mantissas of 1024."""
        word = ptx.flip_signs(word)
        return [ptx.biased_bytes(word, selector) for selector in (0x4140, 0x4342)]

    def values(self, fields: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Two's complement."""
        return ((fields ^ jnp.int32(128)) - jnp.int32(128)).astype(jnp.float32)


class Float8Codes(Codes):
    """Bits of float8_e4m3."""

    per_word = 4
    shift = 2.0**-8
    interleave = (0x5140, 0x7362)

    def registers(self, word: Any, zero: Any) -> list[Any]:
        """Exponent and mantissa, moved."""
        return [ptx.e4m3(word, selector) for selector in (0x1404, 0x3424)]

    def values(self, fields: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Their bits."""
        values = lax.bitcast_convert_type(fields.astype(jnp.uint8), jnp.float8_e4m3fn)
        return values.astype(jnp.float32) * jnp.float32(self.shift)


class Int4Codes(Codes):
    """Nibbles minus 8, or minus a zero point of the slot."""

    per_word = 8
    shift = 2.0**-9

    def registers(self, word: Any, zero: Any) -> list[Any]:
        """Channels i and i + 4 of a word share a register."""
        zero = ptx.constant(_MIDDLE_OF_NIBBLES) if zero is None else zero
        return [ptx.nibbles(word, j, zero) for j in range(4)]

    def query(self, chunks: list[list[Any]]) -> list[list[Any]]:
        """As there."""
        fragments = []
        for low, high in zip(chunks[::2], chunks[1::2], strict=True):
            for i in range(2):
                even = ptx.permute(low[i], high[i], 0x5410)
                odd = ptx.permute(low[i], high[i], 0x7632)
                fragments.append([even, odd])
        return fragments

    def zero_points(self, low: Any, high: Any) -> Any:
        """Two float16, minus 2^-9 times each."""
        return ptx.int4_offset(low, high)

    def values(self, fields: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Minus 8, or minus the zero point."""
        middle = jnp.float32(8) if zero is None else zero[:, None]
        return (fields.astype(jnp.float32) - middle) * jnp.float32(self.shift)


CODES: dict[str, type[Codes]] = {
    "int8": Int8Codes,
    "float8_e4m3": Float8Codes,
    "int4": Int4Codes,
    "bfloat16": Bfloat16Codes,
    "float16": Float16Codes,
}
"""By the cache's format, or the dtype of one of floats."""
