"""How many tokens of a prompt one call of a model reads."""

from __future__ import annotations

from typing import Any

import jax

from fdq.ops.attention.cudnn import MOST_MASKED
from pallas_kernels.device import default_device

CHUNK = 512
"""The least that is read at once, where a prompt has so many tokens."""

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
        return CHUNK
    stats = getattr(device, "memory_stats", lambda: None)() or {}
    limit = stats.get("bytes_limit")
    free = None if limit is None else limit - stats.get("bytes_in_use", 0)
    # A model of one's own may say nothing about its widths.
    if jax.process_count() > 1 or not hasattr(config, "hidden_size"):
        free = None
    return chunk_on_gpu(config, batch, slots, free)


def chunk_on_gpu(config: Any, batch: int, slots: int, free: int | None) -> int:
    """`default_chunk` on a GPU with so many bytes free; None where nobody knows."""
    chunk = _ON_GPUS
    if CHUNK * batch * slots <= MOST_MASKED:
        while chunk * batch * slots > MOST_MASKED:
            chunk //= 2
    if free is None:
        return chunk
    while chunk > CHUNK and chunk * batch * token_bytes(config) > free // _SHARE:
        chunk //= 2
    return chunk


def token_bytes(config: Any) -> int:
    """Of a token's activations in one layer: gate and up, and what they become, for each pick."""
    hidden, moe = config.hidden_size, getattr(config, "moe", None)
    width = getattr(config, "intermediate_size", 4 * hidden)
    if moe is not None:
        width = max(width, moe.top_k * moe.intermediate_size)
    return 2 * (4 + 2) * width + 2 * width + 4 * (4 + 2) * hidden
