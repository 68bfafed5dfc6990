"""Scales of a byte or less as kernels read them: int32 words of consecutive groups of a column."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.weights.word_format import shift_right


@dataclasses.dataclass(frozen=True)
class PackedScale:
    """One kind of such scales.

    `decode`: `(int32 codes, whether interpreted)` -> float32, in kernels element by element.
    """

    dtype: str  # what a weight calls it: the canonical array's, or a format's `scale_dtype`
    bits: int  # below 8 a byte holds several, the first lowest
    decode: Callable[[jax.Array, bool], jax.Array]

    @property
    def per_word(self) -> int:
        """Scales of an int32 word."""
        return 32 // self.bits

    def byte_rows(self, groups: int) -> int:
        """Rows of the canonical array."""
        return -(-groups * self.bits // 8)

    def unpack(self, words: jax.Array, groups: int) -> jax.Array:
        """int32 words `[..., W, N]` -> int32 codes `[..., groups, N]`, in plain JAX."""
        *lead, rows, n = words.shape
        mask = jnp.int32((1 << self.bits) - 1)
        fields = [shift_right(words, i * self.bits) & mask for i in range(self.per_word)]
        codes = jnp.stack(fields, axis=-2).reshape(*lead, rows * self.per_word, n)
        return codes[..., :groups, :]


def _e4m3(code: jax.Array, interpreted: bool) -> jax.Array:
    """Of positive numbers, by their bits."""
    value = lax.bitcast_convert_type(code << jnp.int32(20), jnp.float32) * jnp.float32(2.0**120)
    if not interpreted:
        return value
    # Small ones are subnormal float32 numbers before the product, which XLA on CPU flushes.
    return jnp.where(code < 8, code.astype(jnp.float32) * jnp.float32(2.0**-9), value)


def _e8m0(code: jax.Array, interpreted: bool) -> jax.Array:
    return lax.bitcast_convert_type(code << jnp.int32(23), jnp.float32)


def _unsigned(code: jax.Array, interpreted: bool) -> jax.Array:
    return code.astype(jnp.float32)


_KINDS = ("float8_e8m0fnu", 8, _e8m0), ("float8_e4m3fn", 8, _e4m3), ("uint4", 4, _unsigned)
PACKED_SCALES = {kind[0]: PackedScale(*kind) for kind in _KINDS}
"""By dtype; others are floats in a kernel as well."""


def to_float32(scale: jax.Array) -> jax.Array:
    """Scales that multiply whole columns or blocks."""
    if scale.dtype == jnp.float8_e8m0fnu:  # by its bits: 2^-127 would be flushed
        return _e8m0(lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32), True)
    return scale.astype(jnp.float32)


def from_float32(scale: jax.Array, dtype: str) -> jax.Array:
    """Undoes `to_float32`."""
    if dtype == "float8_e8m0fnu":
        bits = lax.bitcast_convert_type(scale, jnp.int32) >> jnp.int32(23)
        return lax.bitcast_convert_type(bits.astype(jnp.uint8), jnp.dtype(dtype))
    return scale.astype(jnp.dtype(dtype))
