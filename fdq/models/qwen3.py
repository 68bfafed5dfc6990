"""Qwen3, dense: norms of queries and keys per head."""

from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768)
    reader.usual(sliding_window=4096, max_window_layers=28)
    fields = reader.base(epsilon=1e-6, tie=False)
    rotary = reader.rotary(theta=10000.0)
    windows = reader.sliding_windows(fields["num_layers"])
    bias = reader.flag("attention_bias", default=False)
    reader.must_be("use_qk_norm", True)
    fields |= {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}
    return DecoderConfig(**fields, rotary=rotary, sliding_windows=windows)


def _write(config: DecoderConfig) -> dict[str, Any]:
    windows = config_writer.windows(config)
    used = windows["sliding_window"] is not None
    return {"attention_bias": config.qkv_bias, "use_sliding_window": used, **windows}


FAMILY = Family(name="qwen3", read=_read, architecture="Qwen3ForCausalLM", write=_write)
