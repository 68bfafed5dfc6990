"""ERNIE-4.5 with experts: a correction bias that only selects, and shared experts."""

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.ernie4_5 import read_base
from fdq.models.family import Family
from fdq.models.parts import MoEConfig

# How it was trained, not what it computes.
_NEUTRAL = (
    "moe_aux_loss_lambda", "moe_capacity", "moe_dropout_prob", "moe_group",
    "moe_multimodal_dispatch_use_allgather", "moe_orthogonal_loss_lambda", "moe_z_loss_lambda",
    "multi_token_pred_lambda", "router_z_loss_coef", "token_balance_loss",
)  # fmt: skip


def _read(reader: ConfigReader) -> DecoderConfig:
    """Layer `l` has experts when `moe_layer_start_index <= l <= moe_layer_end_index` (-1 is the
    last layer) and `(l + 1) % moe_layer_interval == 0`.
    """
    reader.usual(num_key_value_heads=4)
    fields = read_base(reader)
    reader.must_be("use_bias", False)
    reader.must_be("moe_gate", "topk", "top2_fused")
    reader.must_be("moe_gate_act", "softmax")
    reader.neutral(*_NEUTRAL)
    width = reader.integer("moe_intermediate_size", least=1)
    start = reader.integer("moe_layer_start_index", default=0)
    end = reader.integer("moe_layer_end_index", default=-1, least=-1)
    end = fields["num_layers"] - 1 if end == -1 else end
    interval = reader.integer("moe_layer_interval", default=1, least=1)
    layers = range(start, min(end, fields["num_layers"] - 1) + 1)
    moe = MoEConfig(
        num_experts=reader.integer("moe_num_experts", least=1),
        top_k=reader.integer("moe_k", least=1),
        intermediate_size=width,
        layers=tuple(layer for layer in layers if (layer + 1) % interval == 0),
        shared_intermediate_size=reader.integer("moe_num_shared_experts", default=0) * width,
        normalize=reader.flag("moe_norm_gate_logits", default=True),
        norm_min=reader.number("moe_norm_min", default=1e-12),
        correction_bias=reader.flag("moe_use_aux_free", default=True),
    )
    return DecoderConfig(**fields, moe=moe)


def _write(config: DecoderConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    layers = list(moe.layers) or [config.num_layers]
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    return {
        "use_bias": False,
        "moe_num_experts": moe.num_experts,
        "moe_k": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": step,
        "moe_num_shared_experts": moe.shared_intermediate_size // moe.intermediate_size,
        "moe_norm_gate_logits": moe.normalize,
        "moe_norm_min": moe.norm_min,
        "moe_use_aux_free": moe.correction_bias,
    }


FAMILY = Family(
    name="ernie4_5_moe", read=_read, architecture="Ernie4_5_MoeForCausalLM", write=_write
)
