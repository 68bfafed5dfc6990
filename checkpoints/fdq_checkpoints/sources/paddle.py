"""Tensor names of Paddle's ERNIE-4.5 checkpoints (`-Paddle` releases).

As the Hugging Face ones but for the prefix `ernie.`, linear weights stored `[in, out]`, and
q|k|v and gate|up already fused along out.
"""

from fdq.models.tensor_names import Rule

_LAYER = "ernie.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."


def _linear(target: str, name: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{target}.kernel", (f"{name}.weight",)),
        Rule(f"{target}.bias", (f"{name}.bias",)),
    )


EMBEDDING = "ernie.embed_tokens.weight"
HEAD = "lm_head.weight"

RULES: tuple[Rule, ...] = (
    Rule("embed_tokens.embedding", (EMBEDDING,)),
    Rule("norm.scale", ("ernie.norm.weight",)),
    # ERNIE's Paddle code stores an untied head [hidden, vocab], a tied one like the embedding.
    *_linear("lm_head", "lm_head"),
    Rule("layers.{i}.input_layernorm.scale", (_LAYER + "input_layernorm.weight",)),
    Rule(
        "layers.{i}.post_attention_layernorm.scale", (_LAYER + "post_attention_layernorm.weight",)
    ),
    *_linear("layers.{i}.self_attn.qkv_proj", _ATTENTION + "qkv_proj"),
    *_linear("layers.{i}.self_attn.o_proj", _ATTENTION + "o_proj"),
    *_linear("layers.{i}.mlp.gate_up_proj", _MLP + "up_gate_proj"),
    *_linear("layers.{i}.mlp.down_proj", _MLP + "down_proj"),
    Rule("layers.{i}.mlp.router.kernel", (_MLP + "gate.weight",)),
    Rule(
        "layers.{i}.mlp.router.correction_bias",
        (_MLP + "moe_statics.e_score_correction_bias",),
        "row",
    ),
    *_linear("layers.{i}.mlp.experts.gate_up_proj", _MLP + "experts.{e}.up_gate_proj"),
    *_linear("layers.{i}.mlp.experts.down_proj", _MLP + "experts.{e}.down_proj"),
    *_linear("layers.{i}.mlp.shared_experts.gate_up_proj", _MLP + "shared_experts.up_gate_proj"),
    *_linear("layers.{i}.mlp.shared_experts.down_proj", _MLP + "shared_experts.down_proj"),
)
