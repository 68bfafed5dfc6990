"""Mistral: Llama without biases, with a sliding window in all layers or in some."""

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family


def _read(reader: ConfigReader) -> DecoderConfig:
    """A window of 4096 where the config is silent, and `layer_types`, as transformers does."""
    fields = reader.base(epsilon=1e-6, tie=False, kv_heads=8)
    rotary = reader.rotary(theta=10000.0)
    windows = reader.window_of_all(fields["num_layers"], default=4096, by_layer=True)
    return DecoderConfig(**fields, rotary=rotary, sliding_windows=windows)


FAMILY = Family(name="mistral", read=_read)
