"""Seed-OSS: Llama with biases on q, k and v."""

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(num_key_value_heads=8, max_position_embeddings=524288, head_dim=128)
    reader.usual(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    fields = reader.base(epsilon=1e-6, tie=False)
    fields["qkv_bias"] = reader.flag("attention_bias", default=True)
    fields["output_bias"] = reader.flag("attention_out_bias", default=False)
    fields["mlp_bias"] = reader.flag("mlp_bias", default=False)
    reader.full_attention()
    return DecoderConfig(**fields, rotary=reader.rotary(theta=10000.0))


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family(name="seed_oss", read=_read, architecture="SeedOssForCausalLM", write=_write)
