"""A decoder layer that normalizes what attention and MLP read."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from fdq import nn, ops
from fdq.cache.kv_cache import LayerCache


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
        b, t, _ = x.shape
        if cache is not None and start is not None and t == 1 and ops.joins_token_step(b):
            return self._token(x, angles, cache, start)
        y, cache = self.self_attn(self.input_layernorm(x), angles, cache, start=start)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache

    def _token(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache,
        start: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """The same for one token per sequence, in as few launches as the kernels allow."""
        rows = x[:, 0]
        y, cache = self.self_attn.token(
            self.input_layernorm.lazily(rows), angles, cache, start=start
        )
        rows = rows + y
        rows = rows + self.mlp.token(self.post_attention_layernorm.lazily(rows))
        return rows[:, None], cache
