"""GLM-4.5: grouped queries that are rotated in half, and the router of DeepSeek-V3."""

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.deepseek_v3 import (
    correction_bias,
    read_sigmoid_experts,
    sparse_layers,
    write_experts,
    write_sigmoid_router,
    write_sparse_layers,
)
from fdq.models.family import Family


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(
        num_key_value_heads=8, max_position_embeddings=131072, partial_rotary_factor=0.5,
        n_group=1, topk_group=1, routed_scaling_factor=1.0, first_k_dense_replace=1,
        n_shared_experts=1, n_routed_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=1408,
    )  # fmt: skip
    reader.neutral("num_mtp_layers")
    reader.full_attention()
    fields = reader.base(epsilon=1e-5, tie=False)
    fields["qkv_bias"] = reader.flag("attention_bias", default=False)
    fields["qk_norm"] = reader.flag("use_qk_norm", default=False)
    moe = read_sigmoid_experts(reader, sparse_layers(reader, fields["num_layers"]))
    rotary = reader.rotary(theta=10000.0, partial=True)
    return DecoderConfig(**fields, rotary=rotary, moe=moe)


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm,
        "partial_rotary_factor": config.rotary.partial_factor,
        **write_experts(config),
        **write_sparse_layers(config),
        **write_sigmoid_router(config),
    }


FAMILY = Family(
    name="glm4_moe",
    read=_read,
    tensor_names=(correction_bias(),),
    architecture="Glm4MoeForCausalLM",
    write=_write,
)
