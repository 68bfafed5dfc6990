"""What a format of the KV cache is: how keys and values become codes, and codes values again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats.exact_arithmetic import quotient
from fdq.schemes.scheme import CacheSpec

SCALE_DTYPE = jnp.float32
"""Of scales: 32 / D bits an element (FastDeploy's dynamic cache stores bfloat16)."""

TURNED_SCALE_DTYPE = jnp.bfloat16
"""Of scales that no kernel reads: of heads that are turned, and of blocks."""

ZERO_DTYPE = jnp.uint8
"""Of zero points."""

SMALLEST_RANGE = 1e-10
"""What a scale is made from where all numbers are zero."""


MOST_ZERO = 1000.0
"""Steps that a zero point with a fraction may be away from codes: float16 has quarters there."""


def _kept(scale: jax.Array) -> jax.Array:
    return scale.astype(TURNED_SCALE_DTYPE).astype(jnp.float32)


class CacheFormat:
    """One way to store keys (after the rotation) and values; symmetric unless it says otherwise.

    Invariant: `value = (code - zero) * scale`, with one scale (and zero point, where the format has
    them) for each token and head (dynamic), or for each channel or head (static). Attention relies
    on it: scales multiply scores and outputs, never the cache. With granularity `block` a scale
    belongs to a channel of some tokens, or to a token's channels, and zero points have fractions;
    then attention decodes as many slots as it reads at a time.

    A format of your own derives from this class, says what differs and is added with
    `fdq.cache.CACHE_FORMATS.register(MyFormat())`.

    Attributes:
      name: what `CacheSpec.format` calls it.
      grammar_name: what scheme names call it, after the `C`.
      synonyms: what they may call it besides.
      code_dtype: of codes in memory; None where that is the dtype of activations.
      bound: largest code: a scale is the largest magnitude over this.
      has_zero: whether zero points are stored.
      planes: into how many arrays, every `planes`-th channel each, codes are decoded.
      kernel: what the kernels of `pallas_kernels` call it; None where they do not read it.
    """

    name: str
    grammar_name: str
    synonyms: tuple[str, ...] = ()
    bound: float
    code_dtype: Any = None
    has_zero: bool = False
    planes: int = 1
    kernel: str | None = None

    def problem(self, spec: CacheSpec) -> str | None:
        """Why a spec of this format contradicts itself, or None."""
        if spec.zero_point and not self.has_zero:
            return f"{self.name} has no zero points"
        if self.has_zero and not spec.zero_point:
            return f"{self.name} needs zero_point=True"
        return None

    def width(self, head_dim: int) -> int:
        """Codes' last axis for `head_dim` channels; ValueError where they cannot be packed."""
        return head_dim

    def head_dim(self, width: int) -> int:
        """Channels of codes whose last axis is `width`."""
        return width

    def token_range(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest number of each token: float32 `[..., D]` -> `[..., 1]` twice."""
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        return -largest, largest

    def fit(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point (float32, or None) for numbers between `low` and `high`."""
        largest = jnp.maximum(-low, high)
        return quotient(jnp.maximum(largest, jnp.float32(SMALLEST_RANGE)), self.bound), None

    def fit_range(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """As `fit`, but the range need not have 0 in it, and scales are rounded as they are kept.

        The zero point then has a fraction, and lies within MOST_ZERO steps.
        """
        if not self.has_zero:
            return _kept(self.fit(low, high)[0]), None
        middle = (low + high) * jnp.float32(0.5)
        least = jnp.maximum(jnp.abs(middle) / MOST_ZERO, jnp.float32(SMALLEST_RANGE))
        scale = _kept(jnp.maximum(quotient(high - low, self.bound), least))
        return scale, jnp.float32(self.bound / 2) - quotient(middle, scale)

    def encode(self, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """float32 `x [B, KH, T, D]` -> codes; `scale` and `zero` float32 that broadcast to it."""
        raise NotImplementedError

    def decode_planes(self, codes: jax.Array) -> list[jax.Array]:
        """Codes' values before zero point and scale, exactly: `planes` float32 `[..., D / planes]`.

        Array p holds the channels p, p + planes, p + 2 planes ...
        """
        raise NotImplementedError

    def integer_planes(self, codes: jax.Array) -> list[jax.Array] | None:
        """`decode_planes` in int8, where values before zero point and scale are such integers."""
        return None
