"""ERNIE-4.5, dense: interleaved rotary positions, one switch for all biases."""

from __future__ import annotations

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family
from fdq.nn.rotary import RotaryConfig

# Switches of the Paddle configs: how it was trained or is run, not what it computes.
NEUTRAL = (
    "fuse_gate_detach_matmul",
    "fuse_linear",
    "fuse_ln",
    "fuse_rms_norm",
    "fuse_rope",
    "fuse_softmax_mask",
    "fuse_swiglu",
    "ignored_index",
    "max_sequence_length",
    "micro_batch_size",
    "num_acc_steps",
    "use_flash_attention",
    "use_flash_attn",
    "use_recompute",
    "weight_share_add_bias",
)


def _read(reader: ConfigReader) -> DecoderConfig:
    fields = reader.base(epsilon=1e-5, tie=True)
    bias = bool(reader.get("use_bias", default=False))
    reader.must_be("use_rmsnorm", True)
    reader.must_be("compression_ratio", 1.0)
    reader.neutral(*NEUTRAL)
    rotary = reader.rotary(theta=500000.0, interleaved=True)
    reader.full_attention()
    return DecoderConfig(**fields, rotary=rotary, qkv_bias=bias, output_bias=bias, mlp_bias=bias)


_CONFIGS = {
    "ernie-4.5-0.3b": DecoderConfig(
        model_type="ernie4_5",
        vocab_size=103424,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=18,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        rms_norm_epsilon=1e-5,
        rotary=RotaryConfig(theta=500000.0, interleaved=True),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )
}

FAMILY = Family(name="ernie4_5", read=_read, configs=_CONFIGS)
