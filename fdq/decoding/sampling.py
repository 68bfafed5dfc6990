"""Choosing the next token: greedy, temperature, top-k, top-p and min-p."""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from fdq.decoding import checks
from fdq.ops.placement import in_auto_axes, spec_entry
from pallas_kernels.typing import Array, Float, Int

_SMALLEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)  # smaller ones are flushed to zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; each restriction applies to what the one before left.

    Attributes:
      temperature: logits are divided by it; 0 takes the largest logit (greedy), lowest token
        first among equals.
      top_k: only the `top_k` most likely tokens.
      top_p: only the fewest most likely tokens whose probabilities add up to `top_p` or more.
      min_p: only tokens at least `min_p` times as likely as the most likely one.

    Raises:
      ValueError: a value outside its range.
      TypeError: a value that is no number.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p"):
            number = getattr(self, name)
            wrong = isinstance(number, bool) or not isinstance(number, numbers.Real | None)
            if wrong or (number is None and name == "temperature"):
                raise TypeError(f"{name}: expected a number, found {number!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None:
            checks.integer("top_k", self.top_k, least=1)
        for name in ("top_p", "min_p"):
            p = getattr(self, name)
            if p is not None and not 0 < p <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {p}")


def candidates(
    logits: Float[Array, "*b vocab"], sampling: Sampling
) -> tuple[Int[Array, "*b c"], Float[Array, "*b c"]]:
    """The tokens that may be drawn, most likely first, at a temperature above 0.

    `logits [V]` -> tokens [C] int32 and their logits [C] float32 after temperature, relative to
    the largest, -inf for those ruled out; C is `top_k` or V.
    """
    count = min(sampling.top_k or logits.size, logits.size)
    scaled, tokens = jax.lax.top_k(logits.astype(jnp.float32), count)
    # Relative to the largest, which a temperature near 0 must not divide to infinity.
    scaled = (scaled - scaled[0]) / max(sampling.temperature, _SMALLEST_TEMPERATURE)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(scaled)
        before = jnp.cumsum(probabilities) - probabilities
        # The first is always kept: nothing comes before it.
        scaled = jnp.where(before < sampling.top_p, scaled, -jnp.inf)
    if sampling.min_p is not None:
        scaled = jnp.where(scaled >= math.log(sampling.min_p), scaled, -jnp.inf)
    return tokens, scaled


def sample(
    logits: Float[Array, "b vocab"], keys: jax.Array | None, sampling: Sampling | None
) -> Int[Array, " b"]:
    """The next token of each sequence, int32; greedy where `sampling` is None.

    Each sequence has a PRNG key of its own, so that it draws the same alone and in a batch; `keys`
    may be None when greedy.
    """
    if sampling is None or sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys is None:
        raise ValueError("sampling with a temperature above 0 needs PRNG keys")

    def draw(row: jax.Array, key: jax.Array) -> jax.Array:
        tokens, scaled = candidates(row, sampling)
        return tokens[jax.random.categorical(key, scaled)].astype(jnp.int32)

    # Logits may be sharded over the vocabulary, which a sort does not take on Explicit mesh axes.
    return in_auto_axes(jax.vmap(draw), logits, keys, result=lambda: [spec_entry(logits, 0)])
