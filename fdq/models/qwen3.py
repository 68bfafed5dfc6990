"""Qwen3, dense: norms of queries and keys per head."""

from __future__ import annotations

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family
from fdq.nn.rotary import RotaryConfig


def _read(reader: ConfigReader) -> DecoderConfig:
    fields = reader.base(epsilon=1e-6, tie=False)
    bias = bool(reader.get("attention_bias", default=False))
    rotary = reader.rotary(theta=10000.0)
    windows = reader.sliding_windows(fields["num_layers"])
    return DecoderConfig(
        **fields,
        rotary=rotary,
        sliding_windows=windows,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def _published(**fields: Any) -> DecoderConfig:
    return DecoderConfig(
        model_type="qwen3",
        vocab_size=151936,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_epsilon=1e-6,
        rotary=RotaryConfig(theta=1000000.0),
        max_position=40960,
        qk_norm=True,
        bos_token_id=151643,
        eos_token_ids=(151645,),
        **fields,
    )


_CONFIGS = {
    "qwen3-0.6b": _published(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": _published(hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32),
    "qwen3-32b": _published(hidden_size=5120, intermediate_size=25600, num_layers=64, num_heads=64),
}

FAMILY = Family(name="qwen3", read=_read, configs=_CONFIGS)
