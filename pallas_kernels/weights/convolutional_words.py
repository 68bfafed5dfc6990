"""CC2 (WINT2's convolutional code) as words: 16 rows in four bytes.

A byte stands for four rows. It becomes a word of 15 bits by a multiplication, an addition and a
rounding, and the rows are windows of 6 bits of that word, which overlap by 3::

    state = floor(round(round(code * code_scale) + code_offset) + 0.5)      round: to float32
    row i of the four = ((state >> (9, 6, 3, 0)[i]) & 63) - 32

One bit of difference in a rounding is another state and other weights, so the GPU's form names the
rounding of every instruction (`mul.rn` is never fused with the addition that follows). The byte
is read as linear bits, 2^-149 of itself. `code_scale` is staged 2^100 times larger, so that the
product and all that follows is 2^-49 of itself: no exponent leaves the range of float32, and the
roundings are the same ones. The last addition rounds down, to a number of which the mantissa is the
state and one bit of fraction; from there the windows are linear bits, without shifts. The sum with
one half is not rounded by itself, which makes a difference for a single number (2^-25 below 0.5).
States below 0 read as two's complement, as in the definition; they must be below 2^21 in magnitude.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import lane_instructions as lanes
from pallas_kernels.mosaic import mma_instructions as mma
from pallas_kernels.weights.word_format import (
    LINEAR_EXPONENT,
    Arrays,
    LinearWords,
    Rows,
    Storage,
    WordFormat,
    linear_field,
    shift_right,
)

SHIFTS = (9, 6, 3, 0)
"""Lowest bit of the window of each of the four rows of a byte."""

FRACTION_BITS = 1
"""Bits below the state's lowest in the mantissa after the last addition."""

STAGED_SCALE = 100
"""Powers of two that `code_scale` is multiplied by."""

ROUNDED_EXPONENT = STAGED_SCALE - LINEAR_EXPONENT
"""Powers of two that code_offset and the state are multiplied by: the product's."""

# In [2^22, 2^23) float32 numbers are halves. The middle leaves room for negative states.
ROUNDING = 1.5 * 2.0**22 + 0.5


@dataclasses.dataclass(frozen=True)
class ConvolutionalWords(LinearWords):
    """Sixteen rows in a word."""

    def bias(self, zero_point: str) -> float:
        """Windows are 0 .. 63."""
        return 32.0

    @property
    def positions(self) -> list[int]:
        """Of each window in its byte's word."""
        return [shift + FRACTION_BITS for shift in SHIFTS] * 4

    def extra_shapes(self, n: int) -> dict[str, tuple[int, int]]:
        """Both constants of a column, and its scale."""
        return super().extra_shapes(n) | {"super_scale": (1, n)}

    def decode(self, words: Arrays, columns: Arrays, interpreted: bool, layout: Any = None) -> Rows:
        """Per byte one instruction to take it, three to round, then a mask a row."""
        (word,), (code_scale, code_offset) = words, columns
        if interpreted:
            states = interpreted_states(word, code_scale, code_offset)
        else:
            states = rounded_states(word, code_scale, code_offset, layout)
        return [
            linear_field(state, shift + FRACTION_BITS, 6, interpreted)
            for state in states
            for shift in SHIFTS
        ]

    @property
    def paired_rows(self) -> tuple[tuple[int, int], ...] | None:
        """Windows of two bytes."""
        return tuple((8 * i + row, 8 * i + row + 4) for i in range(2) for row in (3, 2, 1, 0))

    def fragment_exponent(self, dtype: Any) -> int:
        """That of fields."""
        return mma.field_exponent(dtype)

    def fragments(
        self, words: Sequence[Any], columns: Sequence[Any], offset: Any, dtype: Any
    ) -> list[list[Any]]:
        """States of two bytes in a word, and their windows as fields, the lowest first."""
        powers = STAGED_SCALE, ROUNDED_EXPONENT
        staged = [mma.scaled(x, 2.0**power) for x, power in zip(columns, powers, strict=True)]
        states = [_emit_state(words[0], byte, *staged) for byte in range(4)]
        positions = [shift + FRACTION_BITS for shift in reversed(SHIFTS)]
        both = [mma.permute(states[i], states[i + 1], 0x5410) for i in (0, 2)]
        fields = [mma.fields(pair, positions, 6, offset, dtype) for pair in both]
        return [[*fields[0], *fields[1]]]


def interpreted_states(
    word: jax.Array, code_scale: jax.Array, code_offset: jax.Array
) -> list[jax.Array]:
    """For each byte of a word, int32 whose bits 1 .. 15 are the state."""
    # XLA may fuse a product and a sum into one rounding. The products with both parts of the scale
    # are exact, so that their sum is rounded once in any case.
    bits = lax.bitcast_convert_type(code_scale, jnp.int32) & jnp.int32(-0x1000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    low = code_scale - high
    states = []
    for byte in range(4):
        code = (shift_right(word, 8 * byte) & jnp.int32(255)).astype(jnp.float32)
        state = jnp.floor(code * high + code * low + code_offset + jnp.float32(0.5))
        states.append(state.astype(jnp.int32) << jnp.int32(FRACTION_BITS))
    return states


def rounded_states(
    word: jax.Array, code_scale: jax.Array, code_offset: jax.Array, layout: Any
) -> list[jax.Array]:
    """The same on a GPU; bits above 21 are not the state's."""

    def emit(word, scale, offset):
        return [_emit_state(word, byte, scale, offset) for byte in range(4)]

    staged = [
        code_scale * jnp.float32(2.0**STAGED_SCALE),
        code_offset * jnp.float32(2.0**ROUNDED_EXPONENT),
    ]
    return lanes.apply(emit, [word, *staged], [jnp.int32] * 4, layout)


def _emit_state(word: Any, byte: int, scale: Any, offset: Any) -> Any:
    return lanes.assembly_bits(
        "{ .reg .f32 a; mul.rn.f32 a, $1, $2; add.rn.f32 a, a, $3; "
        "add.rm.f32 a, a, $4; mov.b32 $0, a; }",
        lanes.read_byte(word, byte),
        scale,
        offset,
        lanes.number(ROUNDING * 2.0**ROUNDED_EXPONENT),
    )


FORMATS: tuple[WordFormat, ...] = (
    ConvolutionalWords(
        name="cc2",
        words=1,
        rows=16,
        columns=("code_scale", "code_offset"),
        column_scale="super_scale",
        scale_dtype="uint4",
        storages=(Storage("WINT2's code", group_size=64, scale_dtype="uint4"),),
    ),
)
