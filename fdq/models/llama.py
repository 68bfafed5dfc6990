"""Llama 3, 3.1, 3.2 and everything that calls itself `llama`."""

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(max_position_embeddings=2048)
    fields = reader.base(epsilon=1e-6, tie=False)
    bias = reader.flag("attention_bias", default=False)
    mlp_bias = reader.flag("mlp_bias", default=False)
    rotary = reader.rotary(theta=10000.0)
    reader.full_attention()
    return DecoderConfig(
        **fields, rotary=rotary, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(name="llama", read=_read, architecture="LlamaForCausalLM", write=_write)
