"""DeepSeek-V3 and R1: latent attention, sigmoid scores, experts chosen from the best groups."""

from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family, Rule
from fdq.models.latent import Latent
from fdq.models.parts import MoEConfig
from fdq.models.rotary_reader import score_factor
from fdq.models.scored_router import ScoredRouter

USUAL = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""What is meant where a config of latent attention is silent."""

# How it was trained or is run, not what it computes.
_NEUTRAL = ("aux_loss_alpha", "ep_size", "num_mtp_layers", "seq_aux")


def read_base(reader: ConfigReader, *, interleaved: bool) -> dict[str, Any]:
    """The fields of all families with latent attention; experts are not among them."""
    reader.neutral(*_NEUTRAL)
    reader.full_attention()
    nope, rope, value = (
        reader.integer(key, least=1)
        for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    reader.must_be("qk_head_dim", nope + rope)
    reader.must_be("head_dim", rope)
    fields = reader.base(epsilon=1e-6, tie=False)
    if fields["num_kv_heads"] != fields["num_heads"]:
        raise reader.wrong(
            ("num_key_value_heads",),
            f"that of attention heads, {fields['num_heads']}",
            fields["num_kv_heads"],
        )
    bias = reader.flag("attention_bias", default=False)
    rotary = reader.rotary(theta=10000.0, interleaved=interleaved)
    rank = reader.get("q_lora_rank", default=None)
    attention = Latent(
        query_rank=None if rank is None else reader.integer("q_lora_rank", least=1),
        rank=reader.integer("kv_lora_rank", least=1),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=value,
        scale=(nope + rope) ** -0.5 * score_factor(reader, rotary),
    )
    fields |= {"num_kv_heads": 1, "head_dim": rope, "qkv_bias": bias, "output_bias": bias}
    return {**fields, "rotary": rotary, "attention": attention}


def sparse_layers(reader: ConfigReader, count: int) -> tuple[int, ...]:
    """Layer `l` has experts when `l >= first_k_dense_replace` and `l % moe_layer_freq == 0`."""
    first = reader.integer("first_k_dense_replace")
    every = reader.integer("moe_layer_freq", default=1, least=1)
    return tuple(layer for layer in range(first, count) if layer % every == 0)


def read_experts(
    reader: ConfigReader, layers: tuple[int, ...], router: ScoredRouter, **fields: Any
) -> MoEConfig:
    """The experts of `layers`."""
    experts = reader.integer("n_routed_experts", "num_local_experts", least=1)
    top_k = reader.integer("num_experts_per_tok", least=1)
    router.scoring.check(experts, top_k)
    width = reader.integer("moe_intermediate_size", least=1)
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=width,
        layers=layers,
        shared_intermediate_size=width * reader.integer("n_shared_experts", default=0),
        router=router,
        **fields,
    )


def read_sigmoid_router(reader: ConfigReader) -> ScoredRouter:
    """The router of DeepSeek-V3, and of families that took it over."""
    reader.must_be("scoring_func", "sigmoid")
    reader.must_be("topk_method", "noaux_tc")
    return ScoredRouter(
        function="sigmoid",
        groups=reader.integer("n_group", default=1, least=1),
        top_groups=reader.integer("topk_group", default=1, least=1),
        scale=reader.number("routed_scaling_factor"),
    )


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(
        **USUAL, max_position_embeddings=4096, n_group=8, topk_group=4, routed_scaling_factor=2.5,
        first_k_dense_replace=3, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8,
        moe_intermediate_size=2048,
    )  # fmt: skip
    interleaved = reader.flag("rope_interleave", default=True)
    fields = read_base(reader, interleaved=interleaved)
    moe = read_experts(
        reader,
        sparse_layers(reader, fields["num_layers"]),
        read_sigmoid_router(reader),
        normalize=reader.flag("norm_topk_prob", default=True),
        norm_min=1e-20,
        correction_bias=True,
    )
    return DecoderConfig(**fields, moe=moe)


def correction_bias() -> Rule:
    """Where DeepSeek and those after it store it."""
    return Rule(
        "layers.{i}.mlp.router.correction_bias",
        ("model.layers.{i}.mlp.gate.e_score_correction_bias",),
    )


def latent_names() -> tuple[Rule, ...]:
    """Where the tensors of latent attention are."""
    target, source = "layers.{i}.self_attn", "model.layers.{i}.self_attn"
    linears = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    rules = [
        rule
        for name in linears
        for rule in (
            Rule(f"{target}.{name}.kernel", (f"{source}.{name}.weight",), "transposed"),
            Rule(f"{target}.{name}.bias", (f"{source}.{name}.bias",)),
        )
    ]
    norms = ("q_a_layernorm", "kv_a_layernorm")
    rules += [Rule(f"{target}.{name}.scale", (f"{source}.{name}.weight",)) for name in norms]
    return tuple(rules)


FAMILY = Family(name="deepseek_v3", read=_read, tensor_names=(*latent_names(), correction_bias()))
