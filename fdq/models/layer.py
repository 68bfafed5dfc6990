"""A decoder layer that normalizes what attention and MLP read."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from fdq import nn
from fdq.cache.kv_cache import LayerCache
from fdq.nn.handing_on import hand_on
from fdq.nn.norm import normed


class DecoderLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Attributes:
      input_layernorm, post_attention_layernorm: the norms of the two halves.
      self_attn: `nn.Attention`, or what is called like it.
      mlp: `nn.MLP`, `nn.MoE`, or what is called like them.
    """

    def __init__(
        self,
        *,
        input_layernorm: nn.RMSNorm,
        self_attn: Any,
        post_attention_layernorm: nn.RMSNorm,
        mlp: Any,
    ):
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache | None = None,
        *,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [B, T, H]` -> the same shape, and the updated cache; see `fdq.nn.Attention`."""
        rows = normed(self.input_layernorm, x)
        y, cache = hand_on(self.self_attn, rows, angles, cache, start=start)
        x = x + y
        return x + hand_on(self.mlp, normed(self.post_attention_layernorm, x)), cache
