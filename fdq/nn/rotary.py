"""Rotary position embeddings in both conventions, whole or partial, and the ways to stretch them.

The frequencies are those of `transformers.modeling_rope_utils`. Of most types they are constants.
Two depend on how long a sequence is: `dynamic`, whose base grows with it, and `longrope`, which
has one set of them for sequences that fit the original context and one for those that do not.
Tokens are rotated when they are read, by the length that their sequence has then: the tokens of a
prompt by the length of the prompt (in however many pieces it is read), each generated token by the
length that it brings its sequence to. Keys that are in a cache keep their rotation, as they do in
transformers, so decoding with a cache past the original context is not what one forward pass over
the same tokens is: exact are one pass without a cache, and decoding as transformers' `generate`
does. Two differences remain there. Rows of a batch count for themselves, where transformers takes
the longest row for all; and of a long run nothing is remembered, where its `dynamic` keeps the
frequencies of the longest sequence of the past until one comes that fits the original context.
Its Phi-3 alone reads everything anew where decoding takes a sequence past the original context;
here its keys stay as they are too, with a warning. One set of frequencies for all lengths, as some
servers take, is `dataclasses.replace(rotary, short_factor=rotary.long_factor)`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.typing import Array, Float, Int

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""What a config may call them; `none` beside them stands for angles of 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """How positions turn into angles.

    Attributes:
      theta: base of the geometric series of frequencies.
      rope_type: `default`; `linear` divides all frequencies by `factor`; `dynamic` raises `theta`
        for sequences longer than the original context, the more the longer (NTK); `yarn` divides
        the low frequencies by `factor` and blends in between (arXiv 2309.00071); `longrope`
        divides each by a number of its own (arXiv 2402.13753); `llama3` as `yarn`, by wavelength
        (arXiv 2407.21783); `none` turns nothing.
      interleaved: True rotates the pairs (2i, 2i + 1) (ERNIE, GPT-J), False the pairs
        (i, i + d / 2) (Llama, Qwen). Weights are never permuted to fit.
      factor: how many times longer than the original the context is.
      low_freq_factor, high_freq_factor: of `llama3`: turns over the original context below which
        a frequency is divided, and above which it stays.
      original_max_position: tokens of the original context; for `dynamic` all that the config says
        of a context.
      partial_factor: share of head_dim that is rotated, its first channels (d of them); the others
        are left as they are.
      attention_factor: `yarn` and `longrope` multiply cosines and sines by it; None is what their
        papers recommend for `factor`.
      beta_fast, beta_slow: of `yarn`, as `high_freq_factor` and `low_freq_factor` of `llama3`.
      truncate: whether `yarn` blends between whole channels.
      short_factor, long_factor: the numbers of `longrope`, one a pair, for sequences of up to
        `original_max_position` tokens and for longer ones.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    interleaved: bool = False
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    partial_factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        if self.rope_type not in (*ROPE_TYPES, "none"):
            raise ValueError(
                f"rope_type {self.rope_type!r} is not supported; supported are "
                + ", ".join(map(repr, ROPE_TYPES))
            )
        if not 0 < self.partial_factor <= 1:
            raise ValueError(
                f"partial_factor (={self.partial_factor}) must be above 0 and at most 1"
            )
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor (={self.high_freq_factor}) must be greater than "
                f"low_freq_factor (={self.low_freq_factor})"
            )
        if self.rope_type == "yarn" and self.theta <= 1:
            raise ValueError(f"yarn: theta (={self.theta}) must be greater than 1")
        if self.rope_type == "longrope" and self.original_max_position < 2:
            raise ValueError(
                f"longrope: original_max_position (={self.original_max_position}) must be 2 or more"
            )

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long a sequence is."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor if self.rope_type in ("yarn", "longrope") else 1.0
        if self.factor > 1 and self.rope_type == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        if self.factor > 1 and self.rope_type == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position))
        return 1.0

    def warn_of_growth(self, known: int, capacity: int) -> None:
        """Warns where a sequence of `known` tokens may get other frequencies before it is full."""
        original = self.original_max_position
        if self.short_factor == self.long_factor:
            return
        if self.rope_type == "longrope" and known <= original < capacity:
            warnings.warn(
                f"longrope: a sequence of {known} tokens in a cache of {capacity} slots may grow "
                f"past {original} tokens. Tokens from there on are rotated by long_factor, keys "
                "that are stored already stay rotated by short_factor, and the text may suffer. "
                "Make a shorter cache, or give long_factor as short_factor too.",
                stacklevel=3,
            )

    def rotated(self, head_dim: int) -> int:
        """Channels of a head that are rotated.

        Raises:
          ValueError: none of them, or factors of `longrope` that are not one for each pair.
        """
        d = int(head_dim * self.partial_factor)
        if not d:
            raise ValueError(
                f"partial_factor (={self.partial_factor}) of head_dim (={head_dim}) is no channel"
            )
        for name in ("short_factor", "long_factor") if self.rope_type == "longrope" else ():
            found = len(getattr(self, name))
            if found != (d + 1) // 2:
                raise ValueError(
                    f"{name} has {found} entries, expected {(d + 1) // 2}: one for each two of the "
                    f"{d} rotated channels of a head"
                )
        return d


def inverse_frequencies(config: RotaryConfig, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Radians per position of each pair: `[rotated channels / 2]` float32.

    Where they depend on the length of a sequence, those of one that fits the original context, or
    of `longrope` with `long` those of one that does not.
    """
    d = config.rotated(head_dim)
    if config.rope_type == "none":
        return np.zeros((d + 1) // 2, np.float32)
    frequencies = config.theta ** -(np.arange(0, d, 2, dtype=np.float64) / d)
    if config.rope_type == "linear":
        frequencies = frequencies / config.factor
    elif config.rope_type == "llama3":
        # Turns of each pair over the original context: few means a low frequency.
        turns = config.original_max_position * frequencies / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / config.factor)
    elif config.rope_type == "yarn":
        keep = _kept_by_yarn(config, d)
        frequencies = frequencies * (keep + (1 - keep) / config.factor)
    elif config.rope_type == "longrope":
        frequencies = frequencies / np.asarray(config.long_factor if long else config.short_factor)
    return frequencies.astype(np.float32)


def _kept_by_yarn(config: RotaryConfig, d: int) -> np.ndarray:
    """How much of each frequency `yarn` keeps: 1 down to 0, linear in the index of the pair."""

    def pair(turns: float) -> float:
        """The (broken) index of the pair that makes so many turns over the original context."""
        longest = config.original_max_position / (turns * 2 * math.pi)
        return d * math.log(longest) / (2 * math.log(config.theta))

    first, last = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    if first == last:
        last += 0.001  # a step, as transformers makes it
    return 1 - np.clip((np.arange((d + 1) // 2) - first) / (last - first), 0, 1)


def rotary_angles(
    positions: Int[Array, "b t"],
    config: RotaryConfig,
    head_dim: int,
    *,
    lengths: Int[Array, " b"] | Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b t c"]]:
    """Cosines and sines of `positions [B, T]`, each `[B, T, rotated channels / 2]` float32.

    `lengths` are the tokens of each sequence, where the frequencies depend on them, or `[B, T]`
    those at each of its tokens; by default up to the last of its positions. Both are multiplied by
    `config.scale`.
    """
    frequencies = jnp.asarray(inverse_frequencies(config, head_dim)).reshape(1, 1, -1)
    if config.by_length:
        if lengths is None:
            lengths = positions.max(axis=1) + 1
        each = lengths[..., None] if lengths.ndim == 2 else lengths[:, None, None]
        frequencies = _by_length(frequencies, each, config, head_dim)
    with jax.named_scope("rotary_angles"):
        angles = positions.astype(jnp.float32)[..., None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return (cos, sin) if config.scale == 1 else (cos * config.scale, sin * config.scale)


def _by_length(
    frequencies: jax.Array, lengths: jax.Array, config: RotaryConfig, head_dim: int
) -> jax.Array:
    """Frequencies for `lengths [B, 1 or T, 1]`, with C for its last axis, from the usual ones."""
    original = config.original_max_position
    if config.rope_type == "longrope":
        long = jnp.asarray(inverse_frequencies(config, head_dim, long=True)).reshape(1, 1, -1)
        return jnp.where(lengths > original, long, frequencies)
    # theta grows by `growth ** (d / (d - 2))`: the highest frequency stays, and the lowest is
    # divided by `growth`.
    d = config.rotated(head_dim)
    over = jnp.maximum(lengths - original, 0).astype(jnp.float32)
    growth = 1 + over * np.float32(config.factor / original)
    shares = np.arange(0, d, 2, dtype=np.float32) / max(d - 2, 1)
    return frequencies * jnp.exp(-jnp.log(growth) * shares.reshape(1, 1, -1))
