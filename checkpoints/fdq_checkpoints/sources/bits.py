"""Codes packed into integers by other tools, and fdq's packing of them: NumPy, on the host.

fdq's canonical codes are one little-endian bit stream a column, along K. Where another tool packs
along K too, its words are turned as bytes and nothing is unpacked.
"""

import numpy as np

from fdq.formats.packing import UNITS

_PIECE = 2**24


def along_in(words: np.ndarray, k: int, bits: int) -> np.ndarray:
    """`[N, words]` of a dense stream along K -> fdq's packed codes `[bytes, N]`."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    size, rows = UNITS[bits]
    return np.ascontiguousarray(stream[:, : -(-k // rows) * size].T)


def along_rows(words: np.ndarray, k: int, bits: int) -> np.ndarray:
    """`[words, N]` of a dense stream along K -> fdq's packed codes `[bytes, N]`."""
    count, n = words.shape
    stream = np.ascontiguousarray(words).view(np.uint8).reshape(count, n, -1)
    packed = stream.transpose(0, 2, 1).reshape(-1, n)
    size, rows = UNITS[bits]
    return np.ascontiguousarray(packed[: -(-k // rows) * size])


def unpacked(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """`[rows, words]` of a dense little-endian stream -> uint8 codes `[rows, count]`."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (stream[..., None] >> shifts) & np.uint8(2**bits - 1)
        return codes.reshape(stream.shape[0], -1)[:, :count]
    result = np.empty((stream.shape[0], count), np.uint8)
    rows = max(1, _PIECE // max(1, 8 * stream.shape[1]))
    weights = (1 << np.arange(bits)).astype(np.uint8)
    for start in range(0, len(stream), rows):
        piece = np.unpackbits(stream[start : start + rows], axis=1, bitorder="little")
        piece = piece[:, : count * bits].reshape(-1, count, bits)
        result[start : start + rows] = (piece * weights).sum(-1, dtype=np.uint8)
    return result


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes `[K, N]` -> fdq's packed codes `[bytes, N]`."""
    size, rows = UNITS[bits]
    if bits == 8:
        return codes
    if missing := -len(codes) % rows:
        codes = np.pad(codes, [(0, missing), (0, 0)])
    units = codes.reshape(-1, rows, codes.shape[-1])
    kind = np.uint8 if size == 1 else np.uint32
    word = np.zeros((len(units), codes.shape[-1]), kind)
    for i in range(rows):
        word |= units[:, i].astype(kind) << kind(bits * i)
    if size == 1:
        return word
    parts = [(word >> kind(8 * b)).astype(np.uint8) for b in range(size)]
    return np.stack(parts, axis=1).reshape(-1, codes.shape[-1])


def signed(codes: np.ndarray) -> np.ndarray:
    """8-bit codes in offset binary -> int8."""
    return (codes ^ np.uint8(0x80)).view(np.int8)


def nibbles_swapped(codes: np.ndarray) -> np.ndarray:
    """Bytes whose first code is the high nibble -> the low one first."""
    return (codes >> np.uint8(4)) | (codes << np.uint8(4))
