"""DeepSeek-V2: latent attention, softmax scores, groups of experts in the large model."""

import dataclasses
from typing import Any

from fdq.models import config_writer
from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.models.deepseek_v3 import (
    USUAL,
    latent_names,
    read_base,
    read_experts,
    sparse_layers,
    write_base,
    write_experts,
    write_sparse_layers,
)
from fdq.models.family import Family
from fdq.models.scored_router import ScoredRouter

_GREEDY, _BY_GROUP = "greedy", "group_limited_greedy"


def _read(reader: ConfigReader) -> DecoderConfig:
    """A group is as good as its best expert; weights are never made to sum to 1."""
    reader.usual(
        **USUAL, max_position_embeddings=2048, first_k_dense_replace=0, n_shared_experts=2,
        n_routed_experts=64, moe_intermediate_size=1407, topk_method=_GREEDY,
    )  # fmt: skip
    fields = read_base(reader, interleaved=True)
    reader.must_be("mlp_bias", False)
    reader.must_be("norm_topk_prob", False)
    reader.must_be("scoring_func", "softmax")
    reader.must_be("topk_method", _GREEDY, _BY_GROUP)
    groups, best = (reader.integer(key, default=1, least=1) for key in ("n_group", "topk_group"))
    router = ScoredRouter(scale=reader.number("routed_scaling_factor", default=1.0))
    if reader.get("topk_method") == _BY_GROUP:
        router = dataclasses.replace(router, groups=groups, top_groups=best, best_of_group=1)
    moe = read_experts(reader, sparse_layers(reader, fields["num_layers"]), router, normalize=False)
    return DecoderConfig(**fields, moe=moe)


def _write(config: DecoderConfig) -> dict[str, Any]:
    base, experts = write_base(config), write_experts(config)
    router = config_writer.part(config, "moe.router", ScoredRouter)
    return {
        **base,
        **experts,
        **write_sparse_layers(config),
        "scoring_func": "softmax",
        "topk_method": _BY_GROUP if router.best_of_group == 1 else _GREEDY,
        "n_group": router.groups,
        "topk_group": router.top_groups,
        "routed_scaling_factor": router.scale,
    }


FAMILY = Family(
    name="deepseek_v2",
    read=_read,
    tensor_names=latent_names(),
    architecture="DeepseekV2ForCausalLM",
    write=_write,
)
