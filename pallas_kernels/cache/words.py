"""KV caches as 32-bit words: how a kernel loads codes, what they decode to, and how they are made.

Codes `[B, KH, S, D]` are read as int32 words `[B, KH, S, W]`, a bitcast that costs nothing. A word
holds J codes of neighbouring channels: *plane* j of a tile of words is channel `J * w + j` of every
word w.

===============  ========  ===  =========================================
format           dtype     J    value of a code before zero point, scale
===============  ========  ===  =========================================
None             bfloat16  2    the number
None             float16   1    the number (not read as words)
None             float32   1    the number (not read as words)
`int8`           int8      4    the code
`float8_e4m3`    uint8     4    the number that the bits stand for
`int4`           uint8     8    the code minus 8 (static) or minus the zero point of the token
===============  ========  ===  =========================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cache.rounding import at_least, quotient

HEAD_DIMS = (64, 128, 256)

SMALLEST_MAXIMUM = 1e-10
"""Of a token whose numbers are all zero."""


@dataclasses.dataclass(frozen=True)
class CacheWords:
    """How the codes of one cache are loaded, decoded and made; static. One subclass a format.

    A scale is the largest magnitude (with zero points max - min) over `bound`. `middle` is
    subtracted from codes of static scales, so that sums stay small; undone with the zero point.
    """

    format: ClassVar[str | None]  # None for floats
    dtypes: ClassVar[tuple[Any, ...]]  # that codes may have in memory
    packed: ClassVar[int] = 1  # channels of one of them
    has_zero: ClassVar[bool] = False
    bound: ClassVar[float] = 1.0
    middle: ClassVar[float] = 0.0

    dtype: Any  # of the array in memory
    dynamic: bool  # scales (and zero points) belong to a token; otherwise to a channel or head
    head_dim: int
    natural: bool = False  # one plane: for results that were never split into planes

    @property
    def per_word(self) -> int:
        """J, codes in a word; 1 where elements are not read as words."""
        return 4 // self.dtype.itemsize * self.packed

    @property
    def planes(self) -> int:
        """J, or 1."""
        return 1 if self.natural else self.per_word

    @property
    def static(self) -> bool:
        """Whether there are scales of channels or heads."""
        return self.format is not None and not self.dynamic

    @property
    def width(self) -> int:
        """W, words (or elements) of a slot."""
        return self.head_dim // self.planes

    @property
    def vector(self) -> int:
        """Words (or elements) that a thread loads at once when 8 threads share a slot."""
        return min(4, self.width // 8)

    def view(self, codes: jax.Array) -> jax.Array:
        """`[B, KH, S, W]` of the codes, without a copy."""
        if self.planes == 1:
            return codes
        pairs = codes.reshape(*codes.shape[:-1], self.width, 4 // codes.dtype.itemsize)
        return lax.bitcast_convert_type(pairs, jnp.int32)

    def decode(self, words: jax.Array, zero: jax.Array | None = None) -> list[jax.Array]:
        """J float32 arrays of the shape of `words`: the codes before the scale, exactly.

        Words are int32, or floats that are not read as words; `zero` is what `zero_of` makes of the
        zero point of each word's token, None where static.
        """
        raise NotImplementedError(type(self).__name__)

    def zero_of(self, points: jax.Array) -> jax.Array:
        """float32 zero points as `decode` takes them."""
        return points

    def fit(
        self, x: list[jax.Array], largest: Callable[[list[jax.Array]], jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point (or None) of one token in pieces, as vectors; `largest` is of
        non-negative numbers.
        """
        wide = at_least(largest([jnp.abs(one) for one in x]), SMALLEST_MAXIMUM)
        return quotient(wide, jnp.float32(self.bound)), None

    def encode(self, x: jax.Array, scale: Any, zero: Any) -> jax.Array:
        """A piece of a token as codes, int32 where they are integers."""
        raise NotImplementedError(type(self).__name__)

    def pack(self, codes: list[jax.Array]) -> list[jax.Array]:
        """Codes of neighbouring pieces as they lie in memory."""
        return codes

    # -- the same in `jax.numpy`, from the definition

    def values(self, codes: jax.Array) -> jax.Array:
        """float32 `[B, KH, S, D]` of codes, before zero point and scale."""
        return codes.astype(jnp.float32)

    def codes(self, x: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
        """float32 `[..., D]` as codes; scale and zero point broadcast to it."""
        raise NotImplementedError(type(self).__name__)

    def parameters(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point `[..., 1]` of tokens `[..., D]`."""
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        wide = jnp.maximum(largest, jnp.float32(SMALLEST_MAXIMUM))
        return quotient(wide, jnp.float32(self.bound)), None


def as_float(bits: jax.Array) -> jax.Array:
    """int32 as the float32 of these bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)
