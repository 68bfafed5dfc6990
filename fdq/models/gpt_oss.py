"""gpt-oss: attention sinks, a window in every other layer, biased experts with a clamped gate."""

from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import FULL, SLIDING, ConfigReader
from fdq.models.family import Family, Layout, Rule
from fdq.models.parts import ClampedMoE, GroupedQuery, SoftmaxRouter

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_LAYER = "model.layers.{i}."
_TARGET = "layers.{i}."


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(
        num_key_value_heads=8, head_dim=64, sliding_window=128, max_position_embeddings=131072
    )
    if all(reader.config.get(key) is None for key in ("rope_parameters", "rope_scaling")):
        reader.config = {**reader.config, "rope_parameters": _ROPE}
    fields = reader.base(epsilon=1e-5, tie=False)
    layers = fields["num_layers"]
    windows = reader.window_by_layer([FULL if i % 2 else SLIDING for i in range(layers)])
    rotary = reader.rotary(theta=150000.0)
    bias = reader.flag("attention_bias", default=True)
    reader.neutral("initial_context_length")
    moe = ClampedMoE(
        num_experts=reader.integer("num_local_experts", "num_experts", default=128, least=1),
        top_k=reader.integer("num_experts_per_tok", "experts_per_token", default=4, least=1),
        intermediate_size=fields["intermediate_size"],
        layers=tuple(range(layers)),
        router=SoftmaxRouter(bias=True),
        alpha=reader.number("swiglu_alpha", default=1.702),
        limit=reader.number("swiglu_limit", default=7.0),
    )
    return DecoderConfig(
        **fields,
        qkv_bias=bias,
        output_bias=bias,
        rotary=rotary,
        sliding_windows=windows,
        attention=GroupedQuery(sinks=True),
        moe=moe,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    moe, rotary = config_writer.part(config, "moe", ClampedMoE), config.rotary
    return {
        "attention_bias": config.qkv_bias,
        **config_writer.window_by_layer(config),
        **({"rope_scaling": {"rope_type": "default"}} if rotary.rope_type == "default" else {}),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "swiglu_alpha": moe.alpha,
        "swiglu_limit": moe.limit,
    }


_EXPERTS: tuple[tuple[str, str, Layout], ...] = (
    ("gate_up_proj.kernel", "gate_up_proj", "interleaved"),
    ("gate_up_proj.bias", "gate_up_proj_bias", "interleaved"),
    ("down_proj.kernel", "down_proj", "same"),
    ("down_proj.bias", "down_proj_bias", "same"),
)

FAMILY = Family(
    name="gpt_oss",
    read=_read,
    architecture="GptOssForCausalLM",
    write=_write,
    tensor_names=(
        Rule(f"{_TARGET}self_attn.sinks", (f"{_LAYER}self_attn.sinks",)),
        Rule(f"{_TARGET}mlp.router.kernel", (f"{_LAYER}mlp.router.weight",), "transposed"),
        Rule(f"{_TARGET}mlp.router.bias", (f"{_LAYER}mlp.router.bias",)),
        *(
            Rule(f"{_TARGET}mlp.experts.{ours}", (f"{_LAYER}mlp.experts.{theirs}",), layout)
            for ours, theirs, layout in _EXPERTS
        ),
    ),
)
