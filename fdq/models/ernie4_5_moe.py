"""ERNIE-4.5 with experts: a correction bias that only selects, and shared experts."""

from __future__ import annotations

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.ernie4_5 import NEUTRAL
from fdq.models.family import Family
from fdq.models.parts import MoEConfig
from fdq.nn.rotary import RotaryConfig

_MOE_NEUTRAL = (
    "moe_aux_loss_lambda",
    "moe_capacity",
    "moe_dropout_prob",
    "moe_group",
    "moe_multimodal_dispatch_use_allgather",
    "moe_orthogonal_loss_lambda",
    "moe_z_loss_lambda",
    "multi_token_pred_lambda",
    "router_z_loss_coef",
    "token_balance_loss",
)


def _read(reader: ConfigReader) -> DecoderConfig:
    """Layer `l` has experts when `moe_layer_start_index <= l <= moe_layer_end_index` (-1 is the
    last layer) and `(l + 1) % moe_layer_interval == 0`.
    """
    fields = reader.base(epsilon=1e-5, tie=True)
    reader.must_be("use_bias", False)
    reader.must_be("use_rmsnorm", True)
    reader.must_be("compression_ratio", 1.0)
    reader.must_be("moe_gate", "topk", "top2_fused")
    reader.must_be("moe_gate_act", "softmax")
    reader.neutral(*NEUTRAL, *_MOE_NEUTRAL)
    width = reader.integer("moe_intermediate_size")
    start = reader.integer("moe_layer_start_index", default=0)
    end = reader.get("moe_layer_end_index", default=-1)
    end = fields["num_layers"] - 1 if end == -1 else end
    interval = reader.integer("moe_layer_interval", default=1)
    layers = range(start, min(end, fields["num_layers"] - 1) + 1)
    moe = MoEConfig(
        num_experts=reader.integer("moe_num_experts"),
        top_k=reader.integer("moe_k"),
        intermediate_size=width,
        layers=tuple(layer for layer in layers if (layer + 1) % interval == 0),
        shared_intermediate_size=reader.integer("moe_num_shared_experts", default=0) * width,
        normalize=bool(reader.get("moe_norm_gate_logits", default=True)),
        norm_min=float(reader.get("moe_norm_min", default=1e-12)),
        correction_bias=bool(reader.get("moe_use_aux_free", default=True)),
    )
    rotary = reader.rotary(theta=500000.0, interleaved=True)
    reader.full_attention()
    return DecoderConfig(**fields, rotary=rotary, moe=moe)


def _published(moe: MoEConfig, **sizes: Any) -> DecoderConfig:
    return DecoderConfig(
        model_type="ernie4_5_moe",
        vocab_size=103424,
        head_dim=128,
        rms_norm_epsilon=1e-5,
        rotary=RotaryConfig(theta=500000.0, interleaved=True),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
        moe=moe,
        **sizes,
    )


_CONFIGS = {
    "ernie-4.5-21b-a3b": _published(
        MoEConfig(
            num_experts=64,
            top_k=6,
            intermediate_size=1536,
            layers=tuple(range(1, 28)),
            shared_intermediate_size=2 * 1536,
            norm_min=1e-12,
            correction_bias=True,
        ),
        hidden_size=2560,
        intermediate_size=12288,
        num_layers=28,
        num_heads=20,
        num_kv_heads=4,
    ),
    "ernie-4.5-300b-a47b": _published(
        MoEConfig(
            num_experts=64,
            top_k=8,
            intermediate_size=3584,
            layers=tuple(range(3, 54)),
            norm_min=1e-12,
            correction_bias=True,
        ),
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=54,
        num_heads=64,
        num_kv_heads=8,
    ),
}

FAMILY = Family(name="ernie4_5_moe", read=_read, configs=_CONFIGS)
