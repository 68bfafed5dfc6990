"""KV caches as 32-bit words: how a kernel loads codes and what they decode to.

Codes ``[B, KH, S, D]`` are read as int32 words ``[B, KH, S, W]``, a bitcast that costs nothing. A
word holds J codes of neighbouring channels: *plane* j of a tile of words is channel ``J * w + j``
of every word w.

===============  ========  ===  =========================================
format           dtype     J    value of a code before zero point, scale
===============  ========  ===  =========================================
None             bfloat16  2    the number
None             float16   1    the number (not read as words)
None             float32   1    the number (not read as words)
``int8``         int8      4    the code
``float8_e4m3``  uint8     4    the number that the bits stand for
``int4``         uint8     8    the code minus 8 (static) or minus the zero point of the token
===============  ========  ===  =========================================
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic.launch import runs_interpreted
from pallas_kernels.weights.word_format import SIGN_BITS

HEAD_DIMS = (64, 128, 256)

_CODE_DTYPES = {"int8": jnp.int8, "float8_e4m3": jnp.uint8, "int4": jnp.uint8}
_FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_TWO_23 = 0x4B000000  # the float 2^23: a byte in its lowest bits adds exactly that byte
_SIXTEEN = 0x41800000  # the float 16: a nibble in bits 19 .. 22 adds exactly that nibble
INT4_MIDDLE = 8.0
"""Subtracted from static int4 codes, so that sums stay small; undone with the zero point."""


@dataclasses.dataclass(frozen=True)
class CacheWords:
    """How the codes of one cache are loaded and decoded; static.

    Attributes:
      format: ``int8``, ``float8_e4m3``, ``int4``, or None for floats.
      dtype: of the array in memory.
      dynamic: scales (and zero points) belong to a token; otherwise to a channel or head.
      head_dim: D.
      natural: one plane, channels in their order: for results that were never split into planes.
    """

    format: str | None
    dtype: jnp.dtype
    dynamic: bool
    head_dim: int
    natural: bool = False

    @property
    def planes(self) -> int:
        """J, codes in a word; 1 where elements are not read as words."""
        if self.natural:
            return 1
        if self.format is not None:
            return 8 if self.format == "int4" else 4
        return 2 if self.dtype == jnp.bfloat16 else 1

    @property
    def width(self) -> int:
        """W, words (or elements) of a slot."""
        return self.head_dim // self.planes

    @property
    def vector(self) -> int:
        """Words (or elements) that a thread loads at once when 8 threads share a slot."""
        return min(4, self.width // 8)

    def view(self, codes: jax.Array) -> jax.Array:
        """``[B, KH, S, W]`` of the codes, without a copy."""
        size = codes.dtype.itemsize
        if self.planes == 1:
            return codes
        pairs = codes.reshape(*codes.shape[:-1], self.width, 4 // size)
        return lax.bitcast_convert_type(pairs, jnp.int32)

    def decode(self, words: jax.Array, zero: jax.Array | None = None) -> list[jax.Array]:
        """J float32 arrays of the shape of ``words``: the codes before the scale, exactly.

        Args:
          words: int32, or floats that are not read as words.
          zero: 16 + the zero point of each word's token, float32, of a dynamic int4 cache.
        """
        if self.format is None:
            if self.planes == 1:
                return [words.astype(jnp.float32)]
            high = words & jnp.int32(-0x10000)
            return [_float(words << jnp.int32(16)), _float(high)]
        if self.format == "int4":
            offset = jnp.float32(16 + INT4_MIDDLE) if zero is None else zero
            return [_nibble(words, j) - offset for j in range(8)]
        if self.format == "float8_e4m3":
            return [_e4m3(words, j) for j in range(4)]
        flipped = words ^ jnp.int32(SIGN_BITS)
        return [_byte(flipped, j) - jnp.float32(2**23 + 128) for j in range(4)]


def describe_cache(
    caller: str,
    codes: tuple[jax.Array, jax.Array],
    head_dim: int,
    format: str | None,
    scales: tuple[jax.Array | None, jax.Array | None],
    zeros: tuple[jax.Array | None, jax.Array | None],
) -> CacheWords:
    """The description of a cache, of keys and values alike.

    Args:
      caller: named in errors.
      codes: of keys and values, ``[B, KH, S, ...]``.
      head_dim: D.
      format: of the cache.
      scales: of keys and values, ``[B, KH, S]`` per token, ``[KH, D]`` or ``[KH, 1]`` static.
      zeros: likewise zero points.

    Raises:
      NotImplementedError: a head_dim that the kernels have no layout for.
      ValueError: arrays that do not fit the format, or each other.
    """
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(
            f"{caller}: head_dim={head_dim}; the kernels are laid out for "
            f"{', '.join(map(str, HEAD_DIMS))}. Use implementation='xla'."
        )
    k, v = codes
    if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype or not k.size:
        raise ValueError(
            f"{caller}: expected k and v alike, [B, KH, S, ...] and not empty; found k "
            f"{k.dtype.name} {k.shape} and v {v.dtype.name} {v.shape}."
        )
    dtypes = _FLOAT_DTYPES if format is None else (_CODE_DTYPES.get(format),)
    if format is not None and format not in _CODE_DTYPES:
        raise ValueError(
            f"{caller}: cache_format={format!r}; expected None or one of {', '.join(_CODE_DTYPES)}."
        )
    width = head_dim // 2 if format == "int4" else head_dim
    if k.dtype not in dtypes or k.shape[-1] != width:
        names = " or ".join(jnp.dtype(d).name for d in dtypes)
        raise ValueError(
            f"{caller}: a {format or 'float'} cache of head_dim {head_dim} is "
            f"{names} [B, KH, S, {width}], found {k.dtype.name} {k.shape}."
        )
    expected = [format is not None] * 2 + [format == "int4"] * 2
    given = [*scales, *zeros]
    if [a is not None for a in given] != expected:
        names = ("k_scale", "v_scale", "k_zero", "v_zero")
        found = [name for name, a in zip(names, given, strict=True) if a is not None]
        raise ValueError(
            f"{caller}: cache_format={format!r}: both scales go with a quantized format, both zero "
            f"points with 'int4', and only there; found {', '.join(found) or 'none of them'}."
        )
    small = [a for a in given if a is not None]
    kv_heads = k.shape[1]
    shapes = (k.shape[:3], (kv_heads, 1), (kv_heads, head_dim))
    if any(a.shape not in shapes or (a.ndim == 3) != (small[0].ndim == 3) for a in small):
        raise ValueError(
            f"{caller}: scales and zero points must all be [B, KH, S] = {list(k.shape[:3])} or all "
            f"[KH, D or 1] with KH={kv_heads} and D={head_dim}; found {[a.shape for a in small]}."
        )
    return CacheWords(format, k.dtype, bool(small) and small[0].ndim == 3, head_dim)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _byte(words: jax.Array, j: int) -> jax.Array:
    """float32 ``2^23 + byte j``."""
    byte = lax.shift_right_logical(words, jnp.full_like(words, 8 * j)) if j else words
    return _float((byte & jnp.int32(0xFF)) | jnp.int32(_TWO_23))


def _nibble(words: jax.Array, j: int) -> jax.Array:
    """float32 ``16 + nibble j``."""
    shift = 19 - 4 * j
    if shift > 0:
        moved = words << jnp.int32(shift)
    else:
        moved = words >> jnp.int32(-shift) if shift else words
    return _float((moved & jnp.int32(0x780000)) | jnp.int32(_SIXTEEN))


def _e4m3(words: jax.Array, j: int) -> jax.Array:
    """float32 value of byte j; NaN (0x7F) reads as 480.

    The byte's exponent and mantissa go to the float's, 120 too low, the sign to its sign. That
    makes float32 subnormals of the byte's, which a GPU multiplies and XLA on CPU flushes to zero.
    """
    top = words << jnp.int32(24 - 8 * j) if j < 3 else words
    bits = (top >> jnp.int32(4)) & jnp.int32(-0x78100000)  # 0x87F00000: the shift copies the sign
    value = _float(bits) * jnp.float32(2.0**120)
    if not runs_interpreted():
        return value
    mantissa = (bits >> jnp.int32(20)) & jnp.int32(0x7F)
    small = mantissa.astype(jnp.float32) * jnp.float32(2.0**-9)
    small = jnp.where(bits < 0, -small, small)
    return jnp.where(mantissa < 8, small, value)
