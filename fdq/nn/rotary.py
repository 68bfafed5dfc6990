"""Rotary position embeddings in both conventions, with Llama 3's and linear scaling."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.typing import Array, Float, Int

ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """How positions turn into angles.

    Attributes:
      theta: base of the geometric series of frequencies.
      rope_type: `default`; `linear` divides all frequencies by `factor`; `llama3` divides the
        low ones and blends in between (arXiv 2407.21783).
      interleaved: True rotates the pairs (2i, 2i + 1) (ERNIE, GPT-J), False the pairs
        (i, i + head_dim / 2) (Llama, Qwen). Weights are never permuted to fit.
      factor, low_freq_factor, high_freq_factor, original_max_position: see `rope_type`.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    interleaved: bool = False
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type {self.rope_type!r} is not supported; supported are "
                + ", ".join(map(repr, ROPE_TYPES))
            )


def inverse_frequencies(config: RotaryConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair: `[head_dim / 2]` float32."""
    frequencies = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.rope_type == "linear":
        frequencies = frequencies / config.factor
    elif config.rope_type == "llama3":
        # Turns of each pair over the original context: few means a low frequency.
        turns = config.original_max_position * frequencies / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / config.factor)
    return frequencies.astype(np.float32)


def rotary_angles(
    positions: Int[Array, "b t"], config: RotaryConfig, head_dim: int
) -> tuple[Float[Array, "b t c"], Float[Array, "b t c"]]:
    """Cosines and sines of `positions [B, T]`, each `[B, T, head_dim / 2]` float32."""
    frequencies = jnp.asarray(inverse_frequencies(config, head_dim)).reshape(1, 1, -1)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)
