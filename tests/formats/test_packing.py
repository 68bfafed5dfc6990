"""Packing is the little-endian bit stream of each column, whatever the shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdq.formats import packing

pack = jax.jit(packing.pack, static_argnums=1)
unpack = jax.jit(packing.unpack, static_argnums=(1, 2))


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [K, N] -> bytes [P, N] from the definition, by NumPy's own bit packing."""
    k, n = codes.shape
    unpacked = (codes[:, None, :] >> np.arange(bits, dtype=np.uint8)[None, :, None]) & 1
    unit = {2: 8, 3: 24, 4: 8}[bits]
    stream = np.zeros((-(-k * bits // unit) * unit, n), np.uint8)
    stream[: k * bits] = unpacked.reshape(k * bits, n)
    return np.packbits(stream, axis=0, bitorder="little")


@settings(deadline=None, max_examples=15)
@given(
    bits=st.sampled_from([2, 3, 4]),
    k=st.sampled_from([1, 7, 64, 69]),
    n=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pack_is_the_bit_stream_and_unpack_inverts_it(bits, k, n, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (k, n), np.uint8)
    packed = np.asarray(pack(jnp.asarray(codes), bits))
    np.testing.assert_array_equal(packed, bit_stream(codes, bits))
    size, rows = packing.UNITS[bits]
    assert packed.shape[0] == -(-k // rows) * size
    padding = packing.padding_rows(k, bits)
    assert packing.unpacked_rows(packed.shape[0], bits, padding) == k
    back = np.asarray(unpack(jnp.asarray(packed), bits, padding))
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_leading_axes_are_packed_one_by_one(bits, rng):
    codes = jnp.asarray(rng.integers(0, 2**bits, (2, 3, 24, 5), np.uint8))
    packed = packing.pack(codes, bits)
    mapped = jax.vmap(jax.vmap(lambda c: packing.pack(c, bits)))(codes)
    np.testing.assert_array_equal(packed, mapped)
    np.testing.assert_array_equal(packing.unpack(packed, bits), codes)


def test_eight_bits_stay_as_they_are():
    codes = jnp.arange(6, dtype=jnp.uint8).reshape(3, 2)
    assert packing.pack(codes, 8) is codes
    assert packing.unpack(codes, 8) is codes


def test_the_layout_in_words():
    rows = jnp.array([[0x1], [0x2], [0x3]], jnp.uint8)
    assert packing.pack(rows, 4).tolist() == [[0x21], [0x03]]
    assert packing.pack(rows, 2).tolist() == [[0b00_11_10_01]]
    three = jnp.array([[1], [2], [3], [4], [5], [6], [7], [0]], jnp.uint8)
    word = sum(int(c) << (3 * i) for i, c in enumerate(three[:, 0]))
    assert packing.pack(three, 3).tolist() == [[word & 255], [word >> 8 & 255], [word >> 16]]
