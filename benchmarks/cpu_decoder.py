"""A random-weight Llama of 300 million parameters, decoding in several schemes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import fdq
from fdq.models import CONFIGS, Decoder

# Name -> (scheme, cache format, slots of the cache). The last differs from W4A16C8 by unused slots.
SCHEMES = {
    "bfloat16": (None, "C16", 4096),
    "W8A16C8": ("W8A16", "C8", 4096),
    "W4A16C8": ("W4A16", "C8", 4096),
    "W8A8C8": ("W8A8", "C8", 4096),
    "W4A8C8": ("W4A8", "C8", 4096),
    "W4A16C8, 16384 slots": ("W4A16", "C8", 16384),
}


def decoder_cases(steps: int) -> dict[str, tuple[Callable[..., Any], tuple, int]]:
    """Name -> (function that decodes ``steps`` tokens, its arguments, bytes of weights read)."""
    config = CONFIGS["llama-3-8b"].replace(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=16,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        dtype="bfloat16",
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    cases = {}
    for name, (scheme, cache_format, slots) in SCHEMES.items():
        one: Any = model
        if scheme is not None:
            one = fdq.prepare(fdq.quantize(model, scheme, method="absmax"))
        cases[name] = (_Run(one, cache_format, steps, slots), (), steps * _bytes(one))
    return cases


def _bytes(model: Any) -> int:
    """Bytes of every array but the embedding table, of which a step reads one row."""
    _, params = fdq.functional(model)
    return sum(
        leaf.nbytes
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "embed_tokens" not in jax.tree_util.keystr(path)
    )


class _Run:
    """Decodes ``steps`` tokens a call, each call going on from where the last one stopped."""

    def __init__(self, model: Any, cache_format: str, steps: int, capacity: int):
        self.model, self.steps, self.capacity = model, steps, capacity
        self.cache_format = cache_format
        self.state: Any = None
        self.used = self.capacity

    def __call__(self) -> jax.Array:
        if self.used + self.steps > self.capacity:
            cache = fdq.KVCache.init(self.model.config, 1, self.capacity, self.cache_format)
            prompt = jnp.arange(32, dtype=jnp.int32)[None]
            self.state, self.used = fdq.prefill(self.model, prompt, cache), 32
        self.state = fdq.decode(self.model, self.state, self.steps)
        self.used += self.steps
        return self.state.tokens
