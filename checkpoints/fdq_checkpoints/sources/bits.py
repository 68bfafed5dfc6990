"""Codes packed into integers by other tools, and fdq's packing of them: NumPy, on the host.

fdq's canonical codes are one little-endian bit stream a column, along K. Where another tool packs
along K too, its words are turned as bytes and nothing is unpacked.
"""

import jax.numpy as jnp
import numpy as np

from fdq.formats import packing


def along_in(words: np.ndarray, k: int, bits: int) -> np.ndarray:
    """`[N, words]` of a dense stream along K -> fdq's packed codes `[bytes, N]`."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    size, rows = packing.UNITS[bits]
    return np.ascontiguousarray(stream[:, : -(-k // rows) * size].T)


def along_rows(words: np.ndarray, k: int, bits: int) -> np.ndarray:
    """`[words, N]` of a dense stream along K -> fdq's packed codes `[bytes, N]`."""
    count, n = words.shape
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(count, n, -1)
    packed = stream.transpose(0, 2, 1).reshape(-1, n)
    size, rows = packing.UNITS[bits]
    return np.ascontiguousarray(packed[: -(-k // rows) * size])


def words_along_in(codes: np.ndarray, k: int, bits: int) -> np.ndarray:
    """Packed codes `[bytes, N]` of K rows -> int32 `[N, words]`, a dense stream along K."""
    stream = np.ascontiguousarray(codes.view(np.uint8).T)
    size = 4 * -(-k * bits // 32)
    if stream.shape[1] < size:
        stream = np.pad(stream, [(0, 0), (0, size - stream.shape[1])])
    return np.ascontiguousarray(stream[:, :size]).view(np.int32)


def words_along_rows(codes: np.ndarray, k: int, bits: int) -> np.ndarray:
    """Packed codes `[bytes, N]` of K rows -> int32 `[words, N]`, a dense stream along K."""
    return np.ascontiguousarray(words_along_in(codes, k, bits).T)


def unpacked(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """`[rows, words]` of a dense little-endian stream -> uint8 codes `[rows, count]`."""
    stream = along_in(words, count, bits)
    codes = packing.unpack(jnp.asarray(stream), bits, packing.padding_rows(count, bits))
    return np.ascontiguousarray(np.asarray(codes).T)


def words_unpacked(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """`[rows, words]` of int32 -> uint8 codes `[rows, count]`, of any number of bits up to 8.

    The width says whether they are one stream or, as old files have it, whole codes in each word.
    """
    each = 32 // bits
    if words.shape[1] == -(-count * bits // 32):
        stream = np.ascontiguousarray(words).view(np.uint8)
        flat = np.unpackbits(stream, axis=1, bitorder="little", count=count * bits)
        parts = flat.reshape(len(words), count, bits)
        return np.packbits(parts, axis=-1, bitorder="little")[..., 0]
    shifts = np.arange(0, each * bits, bits, dtype=np.uint32)
    plain = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return plain.astype(np.uint8).reshape(len(words), -1)[:, :count]


def words_of(count: int, bits: int) -> tuple[int, int]:
    """How many words hold codes: as one stream, and as whole codes in each."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes `[K, N]` -> fdq's packed codes `[bytes, N]`."""
    return np.asarray(packing.pack(jnp.asarray(codes), bits))


def in_order(codes: np.ndarray, k: int, bits: int, order: np.ndarray) -> np.ndarray:
    """Packed codes of `[K, N]` with their rows taken in an order `[K]`."""
    plain = packing.unpack(jnp.asarray(codes), bits, packing.padding_rows(k, bits))
    return packed(np.asarray(plain)[order], bits)


def signed(codes: np.ndarray) -> np.ndarray:
    """8-bit codes in offset binary -> int8."""
    return (codes ^ np.uint8(0x80)).view(np.int8)


def nibbles_swapped(codes: np.ndarray) -> np.ndarray:
    """Bytes whose first code is the high nibble -> the low one first."""
    return (codes >> np.uint8(4)) | (codes << np.uint8(4))
