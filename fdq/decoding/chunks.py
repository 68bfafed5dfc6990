"""How many tokens of a prompt one call of a model reads."""

from __future__ import annotations

from typing import Any

import jax

from fdq.ops.attention.library import MOST_MASKED
from pallas_kernels.device import default_device

_CHUNK = 512
_ON_GPUS = 2048
# Of the memory that is free: the rest is for decoded weights, scores and what others hold.
_SHARE = 4


def default_chunk(config: Any, batch: int, slots: int) -> int:
    """512; on GPUs 2048, for there a call decodes all weights, or less where memory is short.

    It is halved, to 512 at least, until the rows of a layer's widest activations, in 16 bits and in
    float32, fit in a quarter of the memory that the device has free (where it says so, and there is
    one process: several know their own memory only, and must all compile the same). It is halved
    too where cuDNN then takes the mask of a cache of so many `slots`.
    """
    device = default_device()
    if device.platform not in ("gpu", "cuda"):
        return _CHUNK
    chunk = _ON_GPUS
    if _CHUNK * batch * slots <= MOST_MASKED:
        while chunk * batch * slots > MOST_MASKED:
            chunk //= 2
    stats = getattr(device, "memory_stats", lambda: None)() or {}
    limit = stats.get("bytes_limit")
    # A model of one's own may say nothing about its widths.
    if limit is None or jax.process_count() > 1 or not hasattr(config, "hidden_size"):
        return chunk
    free = (limit - stats.get("bytes_in_use", 0)) // _SHARE
    while chunk > _CHUNK and chunk * batch * token_bytes(config) > free:
        chunk //= 2
    return chunk


def token_bytes(config: Any) -> int:
    """Of a token's activations in one layer: gate and up, and what they become, for each pick."""
    hidden, moe = config.hidden_size, getattr(config, "moe", None)
    width = getattr(config, "intermediate_size", 4 * hidden)
    if moe is not None:
        width = max(width, moe.top_k * moe.intermediate_size)
    return 2 * (4 + 2) * width + 2 * width + 4 * (4 + 2) * hidden
