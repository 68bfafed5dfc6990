"""DeepSeek-V3 and R1: latent attention, sigmoid scores, experts chosen from the best groups."""

import math
from collections.abc import Callable
from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.family import Family, Rule
from fdq.models.latent import Latent
from fdq.models.parts import MoEConfig
from fdq.models.rotary_reader import score_factor, yarn_magnitude
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


def write_base(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_base`."""
    attention = config_writer.part(config, "attention", Latent)
    return {
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": attention.query_rank,
        "kv_lora_rank": attention.rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "attention_bias": config.qkv_bias,
        **_write_score_factor(config, attention),
    }


def _write_score_factor(config: DecoderConfig, attention: Latent) -> dict[str, Any]:
    """`rope_scaling` with the `mscale_all_dim` that makes the scale of the scores, and `mscale`.

    Without them where nothing makes it: then what is written does not read as the config.
    """
    scaling = config_writer.rotary(config.rotary).get("rope_scaling")
    usual, factor = (attention.nope_dim + attention.rope_dim) ** -0.5, config.rotary.factor
    if scaling is None or attention.scale is None or attention.scale == usual or factor <= 1:
        return {}
    magnitude = (attention.scale / usual) ** 0.5
    of_all = _mscale(attention.scale, magnitude, factor, lambda found: usual * found**2)
    if of_all is None:
        return {}
    scaling["mscale_all_dim"] = of_all
    wanted = scaling.get("attention_factor")
    if wanted is not None:
        base = yarn_magnitude(of_all, factor)
        mscale = _mscale(wanted, wanted * base, factor, lambda found: found / base)
        if mscale is not None:  # vLLM reads it, and no attention_factor
            scaling["mscale"] = mscale
            del scaling["attention_factor"]
    return {"rope_scaling": scaling}


def _mscale(
    wanted: float, magnitude: float, factor: float, of: Callable[[float], float]
) -> float | None:
    """The shortest number whose magnitude, which is about `magnitude`, makes exactly `wanted`."""
    near = (magnitude - 1) / (yarn_magnitude(1, factor) - 1)
    numbers = [float(f"{near:.{digits}g}") for digits in range(1, 18)]
    numbers += [math.nextafter(near, end, steps=n) for n in (1, 2, 3) for end in (0, math.inf)]
    found = (x for x in numbers if x > 0 and of(yarn_magnitude(x, factor)) == wanted)
    return next(found, None)


def sparse_layers(reader: ConfigReader, count: int) -> tuple[int, ...]:
    """Layer `l` has experts when `l >= first_k_dense_replace` and `l % moe_layer_freq == 0`."""
    first = reader.integer("first_k_dense_replace")
    return _every(first, reader.integer("moe_layer_freq", default=1, least=1), count)


def write_sparse_layers(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `sparse_layers`; `moe_layer_freq` only where it is not 1."""
    layers = config_writer.part(config, "moe", MoEConfig).layers
    count = config.num_layers
    first = layers[0] if layers else count
    steps = range(1, count + 1)
    every = next((step for step in steps if _every(first, step, count) == layers), 1)
    return {"first_k_dense_replace": first} | ({"moe_layer_freq": every} if every > 1 else {})


def _every(first: int, step: int, count: int) -> tuple[int, ...]:
    return tuple(layer for layer in range(first, count) if layer % step == 0)


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


def write_experts(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_experts`, and `norm_topk_prob`."""
    moe = config_writer.part(config, "moe", MoEConfig)
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_experts": moe.shared_intermediate_size // moe.intermediate_size,
        "norm_topk_prob": moe.normalize,
    }


def read_sigmoid_experts(reader: ConfigReader, layers: tuple[int, ...]) -> MoEConfig:
    """The experts of DeepSeek-V3, and of families that took them over with their router."""
    return read_experts(
        reader,
        layers,
        _read_sigmoid_router(reader),
        normalize=reader.flag("norm_topk_prob", default=True),
        norm_min=1e-20,
        correction_bias=True,
    )


def _read_sigmoid_router(reader: ConfigReader) -> ScoredRouter:
    reader.must_be("scoring_func", "sigmoid")
    reader.must_be("topk_method", "noaux_tc")
    return ScoredRouter(
        function="sigmoid",
        groups=reader.integer("n_group", default=1, least=1),
        top_groups=reader.integer("topk_group", default=1, least=1),
        scale=reader.number("routed_scaling_factor"),
    )


def write_sigmoid_router(config: DecoderConfig) -> dict[str, Any]:
    """What `read_sigmoid_experts` reads of a router."""
    router = config_writer.part(config, "moe.router", ScoredRouter)
    return {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": router.groups,
        "topk_group": router.top_groups,
        "routed_scaling_factor": router.scale,
    }


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.usual(
        **USUAL, max_position_embeddings=4096, n_group=8, topk_group=4, routed_scaling_factor=2.5,
        first_k_dense_replace=3, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8,
        moe_intermediate_size=2048,
    )  # fmt: skip
    interleaved = reader.flag("rope_interleave", default=True)
    fields = read_base(reader, interleaved=interleaved)
    moe = read_sigmoid_experts(reader, sparse_layers(reader, fields["num_layers"]))
    return DecoderConfig(**fields, moe=moe)


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_base(config),
        **write_experts(config),
        **write_sparse_layers(config),
        **write_sigmoid_router(config),
        "rope_interleave": config.rotary.interleaved,
    }


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


FAMILY = Family(
    name="deepseek_v3",
    read=_read,
    tensor_names=(*latent_names(), correction_bias()),
    architecture="DeepseekV3ForCausalLM",
    write=_write,
)
