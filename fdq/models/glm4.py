"""GLM-4: heads that are rotated in part, gate and up in one tensor; GLM-4-0414 with more norms."""

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family, Rule
from fdq.models.parts import Sandwich

_GATE_UP = Rule(
    "layers.{i}.mlp.gate_up_proj.kernel",
    ("model.layers.{i}.mlp.gate_up_proj.weight",),
    "transposed",
)
# Around both halves; what it calls post_attention is before the MLP.
_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def _fields(reader: ConfigReader) -> dict[str, Any]:
    reader.usual(
        num_key_value_heads=2, head_dim=128, max_position_embeddings=131072,
        partial_rotary_factor=0.5, pad_token_id=151329, eos_token_id=[151329, 151336, 151338],
    )  # fmt: skip
    reader.full_attention()
    fields = reader.base(epsilon=1.5625e-07, tie=False)
    fields["qkv_bias"] = reader.flag("attention_bias", default=True)
    return fields | {"rotary": reader.rotary(theta=10000.0, interleaved=True, partial=True)}


def _read(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(**_fields(reader))


def _read_0414(reader: ConfigReader) -> DecoderConfig:
    return DecoderConfig(**_fields(reader), block=Sandwich())


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "partial_rotary_factor": config.rotary.partial_factor,
    }


GLM = Family(
    name="glm",
    read=_read,
    tensor_names=(_GATE_UP,),
    architecture="GlmForCausalLM",
    write=_write,
)

GLM4 = Family(
    name="glm4",
    read=_read_0414,
    tensor_names=(
        _GATE_UP,
        *(
            Rule(f"layers.{{i}}.{own}.scale", (f"model.layers.{{i}}.{theirs}.weight",))
            for own, theirs in _NORMS.items()
        ),
    ),
    architecture="Glm4ForCausalLM",
    write=_write,
)
