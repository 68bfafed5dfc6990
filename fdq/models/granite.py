"""Granite 3: Llama whose embeddings, scores, residuals and logits are multiplied by constants."""

import dataclasses
from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.cache.kv_cache import LayerCache
from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family
from fdq.models.parts import BLOCKS, DecoderLayer, GroupedQuery, PreNorm, half_modules
from fdq.nn.handing_on import hand_on
from fdq.nn.norm import normed


class ScaledLayer(DecoderLayer):
    """`x + scale * half(norm(x))` for both halves; the rest is as in `DecoderLayer`."""

    def __init__(self, *, scale: float, **modules: Any):
        super().__init__(**modules)
        self.scale = scale

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache | None = None,
        *,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """As `DecoderLayer`."""
        with jax.named_scope("self_attn"):
            rows = normed(self.input_layernorm, x)
            y, cache = hand_on(self.self_attn, rows, angles, cache, start=start)
            x = x + self._scaled(y)
        with jax.named_scope("mlp"):
            y = hand_on(self.mlp, normed(self.post_attention_layernorm, x))
            return x + self._scaled(y), cache

    def _scaled(self, y: jax.Array) -> jax.Array:
        """In float32: 0.22 in 16 bits is another number."""
        return (y.astype(jnp.float32) * self.scale).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class ScaledResidual(PreNorm):
    """As `PreNorm`, with what the halves give multiplied by `scale`."""

    name = "scaled_residual"

    scale: float = 1.0

    @override
    def build(self, config: Any, layer: int, *, dtype: Any, rngs: nnx.Rngs) -> DecoderLayer:
        norms = ("input_layernorm", "post_attention_layernorm")
        modules = half_modules(config, layer, norms, dtype, rngs)
        return ScaledLayer(scale=self.scale, **modules)


BLOCKS.register(ScaledResidual)


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(max_position_embeddings=2048)
    fields = reader.base(epsilon=1e-6, tie=False)
    bias = reader.flag("attention_bias", default=False)
    divisor = reader.number("logits_scaling", default=1.0)
    if not divisor:
        raise reader.wrong(("logits_scaling",), "a positive number", divisor)
    mlp_bias = reader.flag("mlp_bias", default=False)
    rotary = reader.rotary(theta=10000.0)
    reader.full_attention()
    return DecoderConfig(
        **fields,
        rotary=rotary,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
        embedding_scale=reader.number("embedding_multiplier", default=1.0),
        logit_divisor=divisor,
        attention=GroupedQuery(scale=reader.number("attention_multiplier", default=1.0)),
        block=ScaledResidual(scale=reader.number("residual_multiplier", default=1.0)),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    attention = config_writer.part(config, "attention", GroupedQuery)
    scale = config.head_dim**-0.5 if attention.scale is None else attention.scale
    return {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "logits_scaling": config.logit_divisor,
        "attention_multiplier": scale,
        "residual_multiplier": config_writer.part(config, "block", ScaledResidual).scale,
    }


FAMILY = Family(name="granite", read=_read, architecture="GraniteForCausalLM", write=_write)
