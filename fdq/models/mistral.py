"""Mistral: Llama without biases, with a sliding window in all layers or in some.

Of a multimodal one (Mistral Small 3.1) its text half.
"""

from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family

# What a multimodal config says of images, and what of the whole holds for its text. Not whether
# embeddings are tied: newer programs write true by default, of text with a head of its own.
_OF_IMAGES = (
    "vision_config", "image_token_index", "image_token_id", "projector_hidden_act",
    "vision_feature_layer", "spatial_merge_size", "multimodal_projector_bias",
    "tie_word_embeddings",
)  # fmt: skip
_OF_THE_WHOLE = (
    "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"
)  # fmt: skip


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
    fields = reader.base(epsilon=1e-6, tie=False)
    rotary = reader.rotary(theta=10000.0)
    windows = reader.window_of_all(fields["num_layers"], by_layer=True)
    return DecoderConfig(**fields, rotary=rotary, sliding_windows=windows)


def _read_multimodal(reader: ConfigReader) -> DecoderConfig:
    reader.neutral(*_OF_IMAGES)
    whole = {key: reader.get(key, default=None) for key in _OF_THE_WHOLE}
    said = {key: found for key, found in whole.items() if found is not None}
    text: dict[str, Any] = {"model_type": "mistral", **said, **reader.mapping("text_config")}
    if text["model_type"] != "mistral":
        raise reader.wrong(("text_config",), "that of a mistral model", text["model_type"])
    config = FAMILY.from_huggingface(text)
    return config.replace(model_type=reader.family)


FAMILY = Family(
    name="mistral",
    read=_read,
    architecture="MistralForCausalLM",
    write=config_writer.windows,
)

MULTIMODAL = Family(
    name="mistral3",
    read=_read_multimodal,
    written_as=FAMILY.name,
    roots={
        "model.language_model.": "lm_head.",
        "language_model.model.": "language_model.lm_head.",
    },
    left_out=(
        "model.vision_tower.*", "model.multi_modal_projector.*", "vision_tower.*",
        "multi_modal_projector.*",
    ),
)  # fmt: skip
