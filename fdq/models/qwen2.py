"""Qwen2 and Qwen2.5: biases on q, k and v only."""

from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(num_key_value_heads=32, max_position_embeddings=32768)
    reader.usual(sliding_window=4096, max_window_layers=28)
    fields = reader.base(epsilon=1e-6, tie=False)
    rotary = reader.rotary(theta=10000.0)
    windows = reader.sliding_windows(fields["num_layers"])
    reader.must_be("qkv_bias", True)
    return DecoderConfig(**fields, rotary=rotary, sliding_windows=windows, qkv_bias=True)


def _write(config: DecoderConfig) -> dict[str, Any]:
    windows = config_writer.windows(config)
    return {"use_sliding_window": windows["sliding_window"] is not None, **windows}


FAMILY = Family(name="qwen2", read=_read, architecture="Qwen2ForCausalLM", write=_write)
