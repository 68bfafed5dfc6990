"""Gemma 3: Gemma 2 with norms of queries and keys, and two bases of rotary positions.

Of a multimodal one its text half.
"""

from collections.abc import Mapping
from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import FULL, SLIDING, ConfigReader
from fdq.models.family import Family
from fdq.models.gemma2 import TENSOR_NAMES, read_base, write_base
from fdq.nn.rotary import RotaryConfig

# What a multimodal config says of images, and what of the whole holds for its text.
_OF_IMAGES = (
    "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
    "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id",
)  # fmt: skip
_OF_THE_WHOLE = (
    "dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"
)  # fmt: skip


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(
        vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    pattern = reader.integer(
        "sliding_window_pattern", "_sliding_window_pattern", default=6, least=1
    )
    reader.must_be("attn_logit_softcapping", None)  # which transformers does not apply
    fields = read_base(reader, pattern)
    return DecoderConfig(
        **fields,
        qk_norm=True,
        rotary=_rotary(reader, FULL, "rope_theta", 1_000_000.0),
        local_rotary=_rotary(reader, SLIDING, "rope_local_base_freq", 10_000.0),
    )


def _rotary(reader: ConfigReader, kind: str, key: str, theta: float) -> RotaryConfig:
    """Rotary positions in layers of a kind: `rope_parameters` has some for each.

    Older configs have `key` for the base, and `rope_scaling` of layers that see everything.
    """
    of_kinds = reader.mapping("rope_parameters")
    unknown = sorted(set(of_kinds) - {FULL, SLIDING})
    if unknown:
        raise ValueError(
            f"{reader.family} config: rope_parameters has {unknown}, expected {FULL!r} and "
            f"{SLIDING!r}: this family rotates its layers in two ways"
        )
    own = dict(ConfigReader({**of_kinds, "model_type": reader.family}).mapping(kind))
    scaling = reader.mapping("rope_scaling")
    if kind == FULL:
        own = _stretched(reader, own, scaling)
    beside = reader.number(key, default=theta)
    longest = {"max_position_embeddings": reader.config.get("max_position_embeddings", 131072)}
    one = ConfigReader({"model_type": reader.family, "rope_parameters": own, **longest})
    return one.rotary(theta=beside)


def _stretched(
    reader: ConfigReader, own: dict[str, Any], scaling: Mapping[str, Any]
) -> dict[str, Any]:
    """`own` parameters with those of `rope_scaling`, each in place of its namesake.

    transformers gives them a `rope_type` first, so that an older `type` of a scaling is not heard.
    """
    named = {"rope_type": own.get("type", "default"), **own, **scaling}
    if scaling.get("type", named["rope_type"]) != named["rope_type"]:
        raise ValueError(
            f"{reader.family} config: rope_scaling says type={scaling['type']!r:.200}, which "
            "transformers does not read in this family: it would rotate by "
            f"rope_type={named['rope_type']!r:.200}. Write rope_type in its place"
        )
    return named


def _write(config: DecoderConfig) -> dict[str, Any]:
    """Only `rope_parameters` say that positions in a window are stretched."""
    whole, local = config.rotary, config.local_rotary or config.rotary
    said = {"rope_local_base_freq": local.theta}
    if local.rope_type != "default":
        kinds = {FULL: whole, SLIDING: local}
        said |= {
            "rope_scaling": None,
            "rope_parameters": {kind: _parameters(one) for kind, one in kinds.items()},
        }
    return write_base(config) | said


def _parameters(rotary: RotaryConfig) -> dict[str, Any]:
    said = config_writer.rotary(rotary)
    return {"rope_type": "default", **said.pop("rope_scaling", {}), **said}


def _read_multimodal(reader: ConfigReader) -> DecoderConfig:
    text = {"model_type": "gemma3_text", **reader.mapping("text_config")}
    whole = {key: reader.get(key, default=None) for key in _OF_THE_WHOLE}
    text |= {key: found for key, found in whole.items() if found is not None}
    reader.neutral(*_OF_IMAGES)
    if text["model_type"] != "gemma3_text":
        raise reader.wrong(("text_config",), "that of a gemma3_text model", text["model_type"])
    config = FAMILY.from_huggingface(text)
    return config.replace(model_type=reader.family)


FAMILY = Family(
    name="gemma3_text",
    read=_read,
    tensor_names=TENSOR_NAMES,
    architecture="Gemma3ForCausalLM",
    write=_write,
)

MULTIMODAL = Family(
    name="gemma3",
    read=_read_multimodal,
    written_as=FAMILY.name,
    tensor_names=TENSOR_NAMES,
    roots={
        "model.language_model.": "lm_head.",
        "language_model.model.": "language_model.lm_head.",
    },
    left_out=(
        "model.vision_tower.*", "model.multi_modal_projector.*", "vision_tower.*",
        "multi_modal_projector.*",
    ),
)  # fmt: skip
