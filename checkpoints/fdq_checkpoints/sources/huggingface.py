"""Tensor names of Hugging Face checkpoints: ERNIE-4.5 (dense and MoE), Llama, Qwen2, Qwen3 (MoE).

Linear weights are stored `[out, in]`, q, k, v and gate, up apart, one tensor an expert. The
families differ in which tensors they have, not in what they are called, so one list of rules
serves all: a model asks only for the tensors that it has. Weights are never permuted for RoPE.
"""

from fdq.models.tensor_names import Rule, Widths

_LAYER = "model.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."


def _linear(target: str, *names: str, widths: Widths = "equal") -> tuple[Rule, Rule]:
    return (
        Rule(f"{target}.kernel", tuple(f"{name}.weight" for name in names), "transposed", widths),
        Rule(f"{target}.bias", tuple(f"{name}.bias" for name in names), "same", widths),
    )


def _norm(target: str, name: str) -> Rule:
    return Rule(f"{target}.scale", (f"{name}.weight",))


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

RULES: tuple[Rule, ...] = (
    Rule("embed_tokens.embedding", (EMBEDDING,)),
    _norm("norm", "model.norm"),
    Rule("lm_head.kernel", (HEAD,), "transposed"),
    Rule("lm_head.bias", ("lm_head.bias",)),
    _norm("layers.{i}.input_layernorm", _LAYER + "input_layernorm"),
    _norm("layers.{i}.post_attention_layernorm", _LAYER + "post_attention_layernorm"),
    *_linear(
        "layers.{i}.self_attn.qkv_proj",
        _ATTENTION + "q_proj",
        _ATTENTION + "k_proj",
        _ATTENTION + "v_proj",
        widths="qkv",
    ),
    *_linear("layers.{i}.self_attn.o_proj", _ATTENTION + "o_proj"),
    _norm("layers.{i}.self_attn.q_norm", _ATTENTION + "q_norm"),
    _norm("layers.{i}.self_attn.k_norm", _ATTENTION + "k_norm"),
    *_linear("layers.{i}.mlp.gate_up_proj", _MLP + "gate_proj", _MLP + "up_proj"),
    *_linear("layers.{i}.mlp.down_proj", _MLP + "down_proj"),
    Rule("layers.{i}.mlp.router.kernel", (_MLP + "gate.weight",), "transposed"),
    Rule(
        "layers.{i}.mlp.router.correction_bias",
        (_MLP + "moe_statics.e_score_correction_bias",),
        "row",
    ),
    *_linear(
        "layers.{i}.mlp.experts.gate_up_proj",
        _MLP + "experts.{e}.gate_proj",
        _MLP + "experts.{e}.up_proj",
    ),
    *_linear("layers.{i}.mlp.experts.down_proj", _MLP + "experts.{e}.down_proj"),
    *_linear(
        "layers.{i}.mlp.shared_experts.gate_up_proj",
        _MLP + "shared_experts.gate_proj",
        _MLP + "shared_experts.up_proj",
    ),
    *_linear("layers.{i}.mlp.shared_experts.down_proj", _MLP + "shared_experts.down_proj"),
)
