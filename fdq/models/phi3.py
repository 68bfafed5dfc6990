"""Phi-3 and Phi-4-mini: queries, keys and values in one tensor, heads that may turn in part."""

from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family, Rule

# What older configs call its one way to stretch a context.
_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(max_position_embeddings=4096, original_max_position_embeddings=4096)
    fields = reader.base(epsilon=1e-5, tie=False)
    rotary = reader.rotary(theta=10000.0, partial=True, types=_TYPES)
    windows = reader.window_of_all(fields["num_layers"])
    reader.must_be("full_attn_mod", 1)
    reader.must_be("interpolate_factor", 1)
    return DecoderConfig(**fields, rotary=rotary, sliding_windows=windows)


def _write(config: DecoderConfig) -> dict[str, Any]:
    rotary = config.rotary
    original = {"original_max_position_embeddings": rotary.original_max_position}
    return config_writer.windows(config, by_layer=False) | (
        original if rotary.rope_type != "default" else {}
    )


FAMILY = Family(
    name="phi3",
    read=_read,
    architecture="Phi3ForCausalLM",
    write=_write,
    tensor_names=(
        Rule(
            "layers.{i}.self_attn.qkv_proj.kernel",
            ("model.layers.{i}.self_attn.qkv_proj.weight",),
            "transposed",
        ),
        Rule(
            "layers.{i}.mlp.gate_up_proj.kernel",
            ("model.layers.{i}.mlp.gate_up_proj.weight",),
            "transposed",
        ),
    ),
)
