"""The part of latent attention: what DeepSeek's models have in place of grouped queries."""

import dataclasses
from collections.abc import Hashable
from typing import Any, override

from flax import nnx

from fdq import nn
from fdq.models.parts import ATTENTIONS, Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(Part):
    """Latent attention; `config.head_dim` is `rope_dim`, and there is one KV head.

    The module is called as `attention(x, angles, cache, start=)`, see `fdq.nn.LatentAttention`.

    Attributes:
      query_rank: numbers of the latent that queries are made of; None where they are made of x.
      rank: numbers of the latent that keys and values are made of.
      nope_dim, rope_dim: channels of a head's queries and keys: not rotated, rotated.
      value_dim: channels of a head's values.
      scale: multiplies the scores; None is `(nope_dim + rope_dim) ** -0.5`.
      epsilon: of the norms of the latents.
    """

    name = "latent"

    query_rank: int | None
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float | None = None
    epsilon: float = 1e-6

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> nn.LatentAttention:
        if config.head_dim != self.rope_dim:
            raise ValueError(
                f"latent attention: head_dim (={config.head_dim}) must be rope_dim "
                f"(={self.rope_dim}), the channels that are rotated"
            )
        return nn.LatentAttention(
            config.hidden_size,
            config.num_heads,
            query_rank=self.query_rank,
            rank=self.rank,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
            scale=self.scale,
            interleaved=config.rotary.interleaved,
            latent_bias=config.qkv_bias,
            output_bias=config.output_bias,
            epsilon=self.epsilon,
            dtype=dtype,
            rngs=rngs,
        )

    @override
    def layer_kind(self, config: Any, layer: int) -> Hashable:
        return self

    @override
    def stored(self, config: Any, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (1, self.rank), (1, self.rope_dim)


ATTENTIONS.register(Latent)
