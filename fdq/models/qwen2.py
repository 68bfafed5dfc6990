"""Qwen2 and Qwen2.5: biases on q, k and v only."""

from __future__ import annotations

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family
from fdq.nn.rotary import RotaryConfig


def _read(reader: ConfigReader) -> DecoderConfig:
    fields = reader.base(epsilon=1e-6, tie=False)
    rotary = reader.rotary(theta=10000.0)
    windows = reader.sliding_windows(fields["num_layers"])
    return DecoderConfig(**fields, rotary=rotary, sliding_windows=windows, qkv_bias=True)


def _published(**fields: Any) -> DecoderConfig:
    return DecoderConfig(
        model_type="qwen2",
        head_dim=128 if fields["hidden_size"] > 1000 else 64,
        rms_norm_epsilon=1e-6,
        rotary=RotaryConfig(theta=1000000.0),
        max_position=32768,
        qkv_bias=True,
        bos_token_id=151643,
        eos_token_ids=(151643,),
        **fields,
    )


_CONFIGS = {
    "qwen2.5-0.5b": _published(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        tie_word_embeddings=True,
    ),
}

FAMILY = Family(name="qwen2", read=_read, configs=_CONFIGS)
