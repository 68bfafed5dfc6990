"""What words decode to: every code of every format, as interpreted and as a GPU does it.

The instructions of the GPU's forms are repeated here in NumPy, whose float32 keeps subnormals and
rounds each operation, so that the constants in them are proven without a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ptx_machine import add_downwards

from fdq.formats import FORMATS
from fdq.formats.convolutional import CODE_OFFSET, CODE_SCALE
from pallas_kernels.weights.convolutional_words import (
    FRACTION_BITS,
    ROUNDED_EXPONENT,
    ROUNDING,
    SHIFTS,
    STAGED_SCALE,
)
from pallas_kernels.weights.formats import WORD_FORMATS
from pallas_kernels.weights.nf4_levels import NF4_LEVELS
from pallas_kernels.weights.word_format import words_to_bytes
from tests.formats.cases import NF4

FLOAT4 = ("mxfp4", "nvfp4")
FLOAT8 = ("float8_e4m3", "float8_e5m2", "mxfp8")
NOT_NUMBERS = {"float8_e4m3": (0x7F, 0xFF), "mxfp8": (0x7F, 0xFF)} | {
    "float8_e5m2": (*range(0x7C, 0x80), *range(0xFC, 0x100))
}


def every_code(name: str) -> np.ndarray:
    """Codes uint8 `[2 units, 256]`: every row has every code."""
    words = WORD_FORMATS[name]
    rows = np.arange(2 * words.rows)[:, None]
    columns = np.arange(256)[None, :]
    if name in FLOAT8:
        codes = (columns + 37 * rows) % 256
        return np.where(np.isin(codes, NOT_NUMBERS[name]), 0, codes).astype(np.uint8)
    return ((columns >> 4 * (rows % 2)) + 5 * rows & 15).astype(np.uint8)


def packed(name: str, codes: np.ndarray) -> np.ndarray:
    """The canonical bytes of those codes."""
    return codes if name in FLOAT8 else codes[::2] | codes[1::2] << 4


def meaning(name: str, codes: np.ndarray) -> np.ndarray:
    """float64 values of codes as fdq defines the format."""
    stored = jnp.asarray(codes)
    if name in FLOAT8:
        kind = jnp.float8_e5m2 if name.endswith("e5m2") else jnp.float8_e4m3fn
        stored = lax.bitcast_convert_type(stored, kind)
    return np.asarray(FORMATS[name].from_codes(stored, None, None)).astype(np.float64)


def decoded(name: str, words: np.ndarray, columns=(), zero_point: str = "none") -> np.ndarray:
    """float64 values `[units * rows, N]` by the form that the interpreter runs, bias applied."""
    format = WORD_FORMATS[name]
    units = jnp.asarray(words).reshape(-1, format.words, words.shape[-1])
    wide = [jnp.broadcast_to(jnp.asarray(c), units[:, 0].shape) for c in columns]
    run = jax.jit(lambda units, wide: format.decode(list(jnp.unstack(units, axis=1)), wide, True))
    rows = run(units, wide)
    powers = np.ldexp(1.0, np.asarray(format.exponents(True)) + format.exponent(True))
    values = np.stack([np.asarray(r, np.float64) * p for r, p in zip(rows, powers, strict=True)], 1)
    return values.reshape(-1, words.shape[-1]) - format.bias(zero_point)


@pytest.mark.parametrize("name", ["nf4", *FLOAT4, *FLOAT8])
def test_every_code_decodes_to_its_meaning(name):
    codes = every_code(name)
    expected = meaning(name, codes)
    assert len(np.unique(expected)) >= 15
    words = WORD_FORMATS[name].pack(jnp.asarray(packed(name, codes)))
    np.testing.assert_array_equal(decoded(name, np.asarray(words)), expected)


@pytest.mark.parametrize("name", sorted(WORD_FORMATS))
def test_words_give_back_any_bytes(name, rng):
    format = WORD_FORMATS[name]
    stored = jnp.asarray(rng.integers(0, 256, (2, 3, 8 * format.words, 7)), jnp.uint8)
    words = format.pack(stored)
    assert words.dtype == jnp.int32
    assert words.shape == (2, 3, 2 * format.words, 7)
    np.testing.assert_array_equal(format.unpack(words), stored)


@pytest.mark.parametrize("name", [*FLOAT4, *FLOAT8])
def test_bits_of_small_floats_are_float32_bits(name):
    """Shifts and masks of the GPU's form, on int32: subnormals included."""
    format = WORD_FORMATS[name]
    codes = every_code(name)
    words = np.asarray(format.pack(jnp.asarray(packed(name, codes))))
    rows = list(format.place(words))
    if name in FLOAT4:  # a shuffle takes the index modulo 32, and its lane's number
        lanes = np.asarray(format.lane_values, np.float32).view(np.int32)
        rows += [lanes[words.view(np.uint32) >> np.uint32(p) & 31] for p in format.indices]
    bits = np.stack(rows, axis=1).reshape(codes.shape)
    assert bits.dtype == np.int32
    scale = np.ldexp(1.0, format.exponent(False) + format.exponents(False)[0])
    values = bits.view(np.float32).astype(np.float64) * scale
    expected = meaning(name, codes)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.signbit(values), np.signbit(expected))


def test_small_floats_leave_room_for_activations():
    """|x| up to 2^60 does not overflow, and the smallest code times 2^-40 is a normal number."""
    for name in (*FLOAT4, *FLOAT8):
        format = WORD_FORMATS[name]
        staged = format.exponents(False)[0]
        values = np.unique(np.abs(meaning(name, every_code(name))))
        smallest, largest = values[1], values[-1]
        decoded_by = format.exponent(False) + staged
        assert np.log2(largest) - decoded_by + staged + 60 < 127
        assert np.log2(smallest) - decoded_by + staged - 40 >= -126


def test_nf4_levels_are_bitsandbytes():
    np.testing.assert_array_equal(np.asarray(NF4_LEVELS), NF4.astype(np.float32))


def test_a_shuffle_needs_no_mask():
    """Lane i holds level i % 16 and a shuffle takes the index modulo 32: bit 4 does not matter."""
    codes = every_code("nf4")
    words = np.asarray(WORD_FORMATS["nf4"].pack(jnp.asarray(packed("nf4", codes))))
    lanes = np.asarray([NF4_LEVELS[lane % 16] for lane in range(32)])
    unsigned = words.view(np.uint32)
    rows = [lanes[(unsigned >> np.uint32(4 * row)) % 32] for row in range(8)]
    values = np.stack(rows, axis=1).reshape(codes.shape)
    np.testing.assert_array_equal(values, meaning("nf4", codes))


def cc2_rows(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The definition in NumPy: bytes `[R, N]` -> float64 `[4 R, N]`."""
    product = codes.astype(np.float32) * scale.astype(np.float32)
    state = np.floor(product + offset.astype(np.float32) + np.float32(0.5)).astype(np.int64)
    rows = np.stack([(state >> shift & 63) - 32 for shift in SHIFTS], axis=1)
    return rows.reshape(-1, codes.shape[-1]).astype(np.float64)


def cc2_columns(rng, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Constants `[1, 512]` of columns; ties are where rounding could go either way."""
    n = (1, 512)
    if kind == "fitted":
        return np.full(n, CODE_SCALE), np.full(n, CODE_OFFSET)
    if kind == "any":
        scale, offset = rng.uniform(40, 128.4, n), rng.uniform(0, 3000, n)
    elif kind == "ties":
        scale, offset = rng.integers(160, 513, n) / 4, rng.integers(0, 4000, n) / 2
    elif kind == "negative":
        scale, offset = -rng.uniform(40, 128.4, n), rng.uniform(-3000, 33000, n)
    else:
        scale, offset = rng.uniform(0, 0.02, n), rng.uniform(-1, 1, n)
    return scale.astype(np.float32), offset.astype(np.float32)


CC2_KINDS = ("fitted", "any", "ties", "negative", "tiny")


@pytest.mark.parametrize("kind", CC2_KINDS)
def test_cc2_decodes_to_its_definition(kind, rng):
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 512))
    scale, offset = cc2_columns(rng, kind)
    words = np.asarray(WORD_FORMATS["cc2"].pack(jnp.asarray(codes)))
    expected = cc2_rows(codes, scale, offset)
    assert len(np.unique(expected)) > 10 or kind == "tiny"
    np.testing.assert_array_equal(decoded("cc2", words, (scale, offset)), expected)


@pytest.mark.parametrize("kind", CC2_KINDS)
def test_cc2_rounds_on_a_gpu_as_its_definition_says(kind, rng):
    """mul.rn, add.rn and add.rm on staged constants, then masks, as the PTX has them."""
    codes = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 512))
    scale, offset = cc2_columns(rng, kind)
    byte = codes.astype(np.int32).view(np.float32)  # linear bits: 2^-149 of the code
    assert byte.max() == 255 * 2.0**-149
    product = byte * (scale * np.float32(2.0**STAGED_SCALE))
    total = product + offset * np.float32(2.0**ROUNDED_EXPONENT)
    assert total.dtype == np.float32
    rounded = add_downwards(total, np.float32(ROUNDING * 2.0**ROUNDED_EXPONENT))
    bits = rounded.view(np.int32)
    rows = []
    for shift in SHIFTS:
        position = shift + FRACTION_BITS
        window = (bits & 63 << position).view(np.float32)
        rows.append(window.astype(np.float64) * 2.0 ** (149 - position) - 32)
    values = np.stack(rows, axis=1).reshape(-1, 512)
    np.testing.assert_array_equal(values, cc2_rows(codes, scale, offset))


def test_cc2_exponents_undo_the_positions():
    format = WORD_FORMATS["cc2"]
    positions = [shift + FRACTION_BITS for shift in SHIFTS] * 4
    for row, position in enumerate(positions):
        power = format.exponents(False)[row] + format.exponent(False)
        assert power == 149 - position
    assert format.bias("none") == 32


@pytest.mark.parametrize("name", FLOAT4)
def test_e2m1_places_fill_the_word(name):
    assert sorted(sum(WORD_FORMATS[name].places, ())) == list(range(32))


def test_words_hold_canonical_bytes_in_order(rng):
    """Formats that do not move bits: a word is four bytes, the lowest first."""
    stored = rng.integers(0, 256, (8, 5)).astype(np.uint8)
    for name in ("nf4", "cc2", "float8_e4m3"):
        words = np.asarray(WORD_FORMATS[name].pack(jnp.asarray(stored)))
        np.testing.assert_array_equal(words_to_bytes(jnp.asarray(words)), stored)
        assert words.view(np.uint32)[0, 0] == int.from_bytes(bytes(stored[:4, 0]), "little")
