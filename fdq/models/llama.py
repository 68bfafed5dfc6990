"""Llama 3, 3.1, 3.2 and everything that calls itself `llama`."""

from __future__ import annotations

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family
from fdq.nn.rotary import RotaryConfig


def _read(reader: ConfigReader) -> DecoderConfig:
    fields = reader.base(epsilon=1e-6, tie=False)
    attention_bias = bool(reader.get("attention_bias", default=False))
    mlp_bias = bool(reader.get("mlp_bias", default=False))
    rotary = reader.rotary(theta=10000.0)
    reader.full_attention()
    return DecoderConfig(
        **fields,
        rotary=rotary,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def _llama3_rotary(factor: float) -> RotaryConfig:
    return RotaryConfig(
        theta=500000.0,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )


def _published(**fields: Any) -> DecoderConfig:
    return DecoderConfig(
        model_type="llama",
        vocab_size=128256,
        num_heads=32,
        num_kv_heads=8,
        rms_norm_epsilon=1e-5,
        bos_token_id=128000,
        eos_token_ids=(128001,),
        **fields,
    )


_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "head_dim": 128,
}

_CONFIGS = {
    "llama-3-8b": _published(**_8B, rotary=RotaryConfig(theta=500000.0), max_position=8192),
    "llama-3.1-8b": _published(**_8B, rotary=_llama3_rotary(8.0)),
    "llama-3.2-1b": _published(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        head_dim=64,
        rotary=_llama3_rotary(32.0),
        tie_word_embeddings=True,
    ),
}

FAMILY = Family(name="llama", read=_read, configs=_CONFIGS)
