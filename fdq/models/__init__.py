"""One config-driven decoder, and a small file per model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdq.models import ernie4_5, ernie4_5_moe, llama, qwen2, qwen3, qwen3_moe
from fdq.models.config import DecoderConfig as DecoderConfig
from fdq.models.config import MoEConfig as MoEConfig
from fdq.models.decoder import Decoder as Decoder
from fdq.models.decoder import DecoderLayer as DecoderLayer
from fdq.models.decoder import abstract as abstract

_FAMILIES = (ernie4_5, ernie4_5_moe, llama, qwen2, qwen3, qwen3_moe)

SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(family.MODEL_TYPE for family in _FAMILIES)
"""Values of `model_type` in a Hugging Face config.json that `from_huggingface` reads."""

CONFIGS: dict[str, DecoderConfig] = {
    name: config for family in _FAMILIES for name, config in family.CONFIGS.items()
}
"""Published models by name, for planning and abstract quantization without a checkpoint."""


def from_huggingface(config: Mapping[str, Any]) -> DecoderConfig:
    """The DecoderConfig of a Hugging Face config.json, read by `json.load`.

    Reads the spelling of transformers 5 (`rope_parameters`) and the older one (`rope_theta`,
    `rope_scaling`). A key that says nothing about the mathematics is ignored; one that is not
    known is an error unless it is null or false. `quantization_config` is not read here.

    Raises:
      ValueError: a model type that is not supported (the message lists the supported ones), a
        missing or unknown key, or a value that asks for something else than what is implemented.
    """
    model_type = config.get("model_type")
    for family in _FAMILIES:
        if model_type == family.MODEL_TYPE:
            return family.from_huggingface(config)
    raise ValueError(
        f"model_type {model_type!r} is not supported; supported are "
        + ", ".join(SUPPORTED_MODEL_TYPES)
    )
