"""Qwen3-MoE: Qwen3 attention, experts without shared ones and without a correction bias."""

from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family
from fdq.models.parts import MoEConfig


def _read(reader: ConfigReader) -> DecoderConfig:
    """Layer `l` has experts unless `mlp_only_layers` names it or `(l + 1) % decoder_sparse_step`
    is not 0.
    """
    reader.usual(num_key_value_heads=4, max_position_embeddings=32768, sliding_window=4096)
    fields = reader.base(epsilon=1e-6, tie=False)
    bias = reader.flag("attention_bias", default=False)
    dense = reader.integers("mlp_only_layers", default=())
    step = reader.integer("decoder_sparse_step", default=1, least=1)
    moe = MoEConfig(
        num_experts=reader.integer("num_experts", "num_local_experts", least=1),
        top_k=reader.integer("num_experts_per_tok", least=1),
        intermediate_size=reader.integer("moe_intermediate_size", least=1),
        layers=tuple(
            i for i in range(fields["num_layers"]) if i not in dense and (i + 1) % step == 0
        ),
        normalize=reader.flag("norm_topk_prob", default=False),
    )
    reader.must_be("use_qk_norm", True)
    rotary = reader.rotary(theta=10000.0)
    windows = ()
    if reader.flag("use_sliding_window", default=False):
        windows = reader.window_of_all(fields["num_layers"])
    else:
        reader.full_attention()
    fields |= {"qkv_bias": bias, "output_bias": bias, "qk_norm": True, "sliding_windows": windows}
    return DecoderConfig(**fields, rotary=rotary, moe=moe)


def _write(config: DecoderConfig) -> dict[str, Any]:
    """Layers without experts are named one by one."""
    moe = config.moe
    assert moe is not None
    windows = config_writer.windows(config, by_layer=False)
    return {
        "attention_bias": config.qkv_bias,
        "use_sliding_window": windows["sliding_window"] is not None,
        **windows,
        "mlp_only_layers": [i for i in range(config.num_layers) if i not in moe.layers],
        "decoder_sparse_step": 1,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalize,
    }


FAMILY = Family(name="qwen3_moe", read=_read, architecture="Qwen3MoeForCausalLM", write=_write)
