"""Packing of 2-, 3- and 4-bit codes into bytes along K.

Invariant: the codes of one column are one little-endian bit stream, row 0 in the lowest bits. So a
byte of 4-bit codes holds rows `2k` (low nibble) and `2k + 1` (high nibble), a byte of 2-bit
codes four rows, and 8 rows of 3-bit codes fill three bytes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.typing import Array, Shaped

UNITS = {2: (1, 4), 3: (3, 8), 4: (1, 2), 8: (1, 1)}
"""Bytes and rows of K in a unit, the smallest whole number of bytes, by bits per code."""


def padding_rows(k: int, bits: int) -> int:
    """Rows that must be added to `k` rows so that the last packed unit is full."""
    return -k % UNITS[bits][1]


def unpacked_rows(packed: int, bits: int, padding: int = 0) -> int:
    """Codes in a column of `packed` bytes of which the last `padding` codes are unused."""
    size, rows = UNITS[bits]
    return packed // size * rows - padding


def pack(codes: Shaped[Array, "*m k n"], bits: int) -> Shaped[Array, "*m bytes n"]:
    """Packs uint8 codes below `2**bits` along K; bits that are not used are zero.

    K need not fill the last unit; with 8 bits the codes are returned as they are.

    Examples:
      >>> pack(jnp.array([[1], [2], [3]], jnp.uint8), 4).tolist()
      [[33], [3]]
    """
    if bits == 8:
        return codes
    *lead, k, n = codes.shape
    count, rows = UNITS[bits]
    missing = padding_rows(k, bits)
    if missing:
        codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, missing), (0, 0)])
    word_dtype: Any = jnp.uint8 if count == 1 else jnp.uint32
    units = codes.reshape(*lead, (k + missing) // rows, rows, n).astype(word_dtype)
    word = units[..., 0, :]
    for i in range(1, rows):
        word = word | (units[..., i, :] << word_dtype(bits * i))
    if count == 1:
        return word
    parts = [(word >> word_dtype(8 * b)).astype(jnp.uint8) for b in range(count)]
    return jnp.stack(parts, axis=-2).reshape(*lead, -1, n)


def unpack(
    packed: Shaped[Array, "*m bytes n"], bits: int, padding: int = 0
) -> Shaped[Array, "*m k n"]:
    """Inverse of `pack`, uint8 `[..., unpacked_rows(P, bits, padding), N]`."""
    if bits == 8:
        return packed
    *lead, p, n = packed.shape
    count, rows = UNITS[bits]
    units = packed.reshape(*lead, p // count, count, n)
    parts = unit_codes([units[..., i, :] for i in range(count)], bits)
    codes = jnp.stack(parts, axis=-2).reshape(*lead, p // count * rows, n)
    return codes[..., : codes.shape[-2] - padding, :] if padding else codes


def unit_codes(unit: list[jax.Array], bits: int) -> list[jax.Array]:
    """The bytes of a unit -> the uint8 codes of its rows; 8-bit codes of any dtype as they are."""
    if bits == 8:
        return unit
    count, rows = UNITS[bits]
    word_dtype: Any = jnp.uint8 if count == 1 else jnp.uint32
    word = unit[0].astype(word_dtype)
    for i in range(1, count):
        word = word | (unit[i].astype(word_dtype) << word_dtype(8 * i))
    mask = word_dtype(2**bits - 1)
    return [((word >> word_dtype(bits * i)) & mask).astype(jnp.uint8) for i in range(rows)]
