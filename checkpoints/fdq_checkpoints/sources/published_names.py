"""Tensor names of Hugging Face's and Paddle's checkpoints: ERNIE-4.5, Llama, Qwen2, Qwen3 (MoE).

Hugging Face stores linear weights `[out, in]`, q, k, v and gate, up apart. Paddle's releases of
ERNIE-4.5 (`-Paddle`) store them `[in, out]`, q|k|v and gate|up fused along out. A model asks only
for the tensors that it has. Weights are never permuted for RoPE.
"""

import dataclasses
from collections.abc import Collection, Mapping

from fdq.models.family import Family, Layout, Rule, Widths


@dataclasses.dataclass(frozen=True)
class Names:
    """One way to name tensors; `embedding` and `head` are those that may be tied."""

    embedding: str
    head: str
    rules: tuple[Rule, ...]

    def of_family(self, family: Family, tensors: Collection[str]) -> "Names":
        """With a family's own rules first, and the beginning of names that `tensors` have."""
        rules = (*family.tensor_names, *self.rules)
        for root, head in family.roots.items():
            beginnings = {"model.": root, "lm_head.": head}
            embedding = renamed(self.embedding, beginnings)
            if embedding in tensors:
                rules = tuple(
                    dataclasses.replace(
                        rule, names=tuple(renamed(name, beginnings) for name in rule.names)
                    )
                    for rule in rules
                )
                return Names(embedding, renamed(self.head, beginnings), rules)
        return dataclasses.replace(self, rules=rules)


def renamed(name: str, beginnings: Mapping[str, str]) -> str:
    """A name with one of its beginnings in place of another."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _names(root: str, layout: Layout, qkv: tuple[str, ...], gate_up: tuple[str, ...]) -> Names:
    """Names that begin with `root.`, of linear weights in one layout."""
    source, target = f"{root}.layers.{{i}}.", "layers.{i}."
    embedding, head = f"{root}.embed_tokens.weight", "lm_head"

    def linear(path: str, *parts: str, widths: Widths = "equal") -> tuple[Rule, Rule]:
        """A linear layer at `path` of a layer, from the tensors beside it that are joined."""
        room, _, _ = path.rpartition(".")
        theirs = [f"{source}{room}.{part}" for part in parts]
        return (
            Rule(f"{target}{path}.kernel", tuple(f"{x}.weight" for x in theirs), layout, widths),
            Rule(f"{target}{path}.bias", tuple(f"{x}.bias" for x in theirs), "same", widths),
        )

    def norm(name: str) -> Rule:
        return Rule(f"{target}{name}.scale", (f"{source}{name}.weight",))

    correction_bias = f"{source}mlp.moe_statics.e_score_correction_bias"
    rules = (
        Rule("embed_tokens.embedding", (embedding,)),
        Rule("norm.scale", (f"{root}.norm.weight",)),
        # ERNIE's Paddle code stores an untied head [hidden, vocab], a tied one like the embedding.
        Rule("lm_head.kernel", (f"{head}.weight",), layout),
        Rule("lm_head.bias", (f"{head}.bias",)),
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
        *linear("self_attn.qkv_proj", *qkv, widths="qkv"),
        *linear("self_attn.o_proj", "o_proj"),
        norm("self_attn.q_norm"),
        norm("self_attn.k_norm"),
        *linear("mlp.gate_up_proj", *gate_up),
        *linear("mlp.down_proj", "down_proj"),
        Rule(f"{target}mlp.router.kernel", (f"{source}mlp.gate.weight",), layout),
        Rule(f"{target}mlp.router.correction_bias", (correction_bias,), "row"),
        *linear("mlp.experts.gate_up_proj", *(f"{{e}}.{part}" for part in gate_up)),
        *linear("mlp.experts.down_proj", "{e}.down_proj"),
        *linear("mlp.shared_experts.gate_up_proj", *gate_up),
        *linear("mlp.shared_experts.down_proj", "down_proj"),
    )
    return Names(embedding, f"{head}.weight", rules)


HUGGING_FACE = _names(
    "model", "transposed", ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
)
PADDLE = _names("ernie", "same", ("qkv_proj",), ("up_gate_proj",))
