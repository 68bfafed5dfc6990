"""ERNIE-4.5, dense: interleaved rotary positions, one switch for all biases."""

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family

# Switches of the Paddle configs: how it was trained or is run, not what it computes.
_NEUTRAL = (
    "fuse_gate_detach_matmul", "fuse_linear", "fuse_ln", "fuse_rms_norm", "fuse_rope",
    "fuse_softmax_mask", "fuse_swiglu", "ignored_index", "max_sequence_length", "micro_batch_size",
    "num_acc_steps", "use_flash_attention", "use_flash_attn", "use_recompute",
    "weight_share_add_bias",
)  # fmt: skip


def read_base(reader: ConfigReader) -> dict[str, Any]:
    """The fields that the dense models share with those that have experts."""
    reader.usual(max_position_embeddings=131072)
    reader.must_be("use_rmsnorm", True)
    reader.must_be("compression_ratio", 1.0)
    reader.neutral(*_NEUTRAL)
    reader.full_attention()
    rotary = reader.rotary(theta=500000.0, interleaved=True)
    fields = reader.base(epsilon=1e-5, tie=True)
    return {**fields, "rotary": rotary}


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(num_key_value_heads=2, head_dim=128)
    bias = reader.flag("use_bias", default=False)
    return DecoderConfig(
        **read_base(reader),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {"use_bias": config.mlp_bias}


FAMILY = Family(name="ernie4_5", read=_read, architecture="Ernie4_5ForCausalLM", write=_write)
