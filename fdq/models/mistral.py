"""Mistral: Llama without biases, with a sliding window in all layers or in some."""

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
    fields = reader.base(epsilon=1e-6, tie=False)
    rotary = reader.rotary(theta=10000.0)
    windows = reader.window_of_all(fields["num_layers"], by_layer=True)
    return DecoderConfig(**fields, rotary=rotary, sliding_windows=windows)


FAMILY = Family(
    name="mistral",
    read=_read,
    architecture="MistralForCausalLM",
    write=config_writer.windows,
)
