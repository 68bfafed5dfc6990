"""Configs as they are written: each is read as it was."""

import dataclasses
import json

import pytest

from fdq import models
from fdq.models.config_writer import to_huggingface
from fdq.models.latent import Latent
from fdq.nn.rotary import RotaryConfig
from tests.checkpoints import builders
from tests.checkpoints.exports import NARROW


@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_config_is_written_as_it_is_read(name):
    config = models.CONFIGS[name]
    assert models.from_huggingface(to_huggingface(config)) == config


YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
RARE = [
    # oracle, changes of its config.json
    ("deepseek_v2", {"q_lora_rank": None, "attention_bias": True, "moe_layer_freq": 2}),
    ("deepseek_v2", {"topk_method": "greedy", "routed_scaling_factor": 16.0}),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.3}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 1.0}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"attention_factor": 1.3}, "norm_topk_prob": False}),
    ("deepseek_v3", {"rope_interleave": False, "n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"first_k_dense_replace": 3, "n_shared_experts": 0}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": False, "rope_parameters": {}}),
    ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 5e5}}),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense", "sparse"], "num_hidden_layers": 3}),
    ("gemma2", {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, **NO_TOKENS}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3", {"rope_parameters": {"sliding_attention": LINEAR, "full_attention": YARN}}),
    ("gemma3", {"final_logit_softcapping": 30.0, "eos_token_id": [1, 106]}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default"}, "attention_bias": False}),
    ("gpt_oss", {"swiglu_limit": 5.0, "swiglu_alpha": 1.5, "layer_types": ["full_attention"] * 2}),
]


@pytest.mark.parametrize(("name", "changes"), RARE, ids=str)
def test_a_rare_config_is_written_as_it_is_read(name, changes):
    known = json.loads((builders.MODELS / name / "config.json").read_text())
    if "mlp_layer_types" in changes:
        known.pop("first_k_dense_replace", None)
    config, usual = models.from_huggingface(known | changes), models.from_huggingface(known)
    assert config != usual
    assert models.from_huggingface(to_huggingface(config)) == config


def test_a_config_that_no_file_can_say_is_refused():
    config = NARROW.replace(qk_norm=True)
    with pytest.raises(ValueError, match="no config.json of llama says qk_norm=True"):
        to_huggingface(config)
    config = models.CONFIGS["deepseek-v3"]
    with pytest.raises(ValueError, match=r"says moe.router=SoftmaxRouter.* part of kind 'scored'"):
        to_huggingface(config.replace(moe=models.CONFIGS["qwen3-30b-a3b"].moe))
    assert isinstance(config.attention, Latent)
    odd = dataclasses.replace(config.attention, scale=0.5)
    with pytest.raises(ValueError, match=r"no config.json of deepseek_v3 says attention=Latent"):
        to_huggingface(config.replace(attention=odd, rotary=RotaryConfig(interleaved=True)))
    with pytest.raises(ValueError, match="no config.json of gpt_oss says moe=None"):
        to_huggingface(models.CONFIGS["gpt-oss-20b"].replace(moe=None))
