"""GLM-4.7-Flash: DeepSeek's latent attention and router, dense layers by name."""

from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.deepseek_v3 import (
    correction_bias,
    latent_names,
    read_base,
    read_sigmoid_experts,
    write_base,
    write_experts,
    write_sigmoid_router,
)
from fdq.models.family import Family
from fdq.models.parts import MoEConfig

_DENSE, _SPARSE = "dense", "sparse"


def _sparse_layers(reader: ConfigReader, count: int) -> tuple[int, ...]:
    """Those that `mlp_layer_types` says have experts; all but the first where it is silent."""
    usual = [_DENSE, *[_SPARSE] * (count - 1)]
    kinds = reader.get("mlp_layer_types", default=usual)
    if not isinstance(kinds, list | tuple) or len(kinds) != count:
        raise reader.wrong(("mlp_layer_types",), f"a list of {count} names", kinds)
    if any(kind not in (_DENSE, _SPARSE) for kind in kinds):
        raise reader.wrong(("mlp_layer_types",), f"a list of {_DENSE!r} and {_SPARSE!r}", kinds)
    first = list(kinds).index(_SPARSE) if _SPARSE in kinds else count
    reader.must_be("first_k_dense_replace", first)  # what other programs read instead
    return tuple(layer for layer, kind in enumerate(kinds) if kind == _SPARSE)


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(
        q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64,
        v_head_dim=256, max_position_embeddings=202752, n_group=1, topk_group=1,
        routed_scaling_factor=1.8, n_shared_experts=1, n_routed_experts=64, num_experts_per_tok=4,
        moe_intermediate_size=1536, rms_norm_eps=1e-5,
    )  # fmt: skip
    fields = read_base(reader, interleaved=reader.flag("rope_interleave", default=True))
    moe = read_sigmoid_experts(reader, _sparse_layers(reader, fields["num_layers"]))
    return DecoderConfig(**fields, moe=moe)


def _write(config: DecoderConfig) -> dict[str, Any]:
    layers = config_writer.part(config, "moe", MoEConfig).layers
    kinds = [_SPARSE if i in layers else _DENSE for i in range(config.num_layers)]
    return {
        **write_base(config),
        **write_experts(config),
        **write_sigmoid_router(config),
        "mlp_layer_types": kinds,
        "first_k_dense_replace": layers[0] if layers else config.num_layers,
        "rope_interleave": config.rotary.interleaved,
    }


FAMILY = Family(
    name="glm4_moe_lite",
    read=_read,
    tensor_names=(*latent_names(), correction_bias()),
    architecture="Glm4MoeLiteForCausalLM",
    write=_write,
)
