"""Models of every family that eight devices divide: heads and channels of 128 for each."""

import dataclasses
import functools
import math
import re

import numpy as np
from flax import nnx

import fdq.models
from tests.models import oracles

PROMPTS = [[3, 1, 4], [1, 5, 9, 2]]


def config_of(name, **changes):
    """The family's oracle with one layer, 8 heads, 2 KV heads, 1024 channels and 8 experts."""
    config = oracles.oracle_config(name)
    sizes = {"hidden_size": 128, "intermediate_size": 1024, "num_layers": 1, "num_heads": 8}
    sizes |= {"num_kv_heads": 2, "head_dim": 128, "vocab_size": 256}
    if config.moe is not None:
        shared = 1024 if config.moe.shared_intermediate_size else 0
        experts = {"num_experts": 8, "top_k": 2, "intermediate_size": 1024, "layers": (0,)}
        experts |= {"shared_intermediate_size": shared}
        router = config.moe.router
        if hasattr(router, "groups"):
            experts["router"] = dataclasses.replace(router, groups=1, top_groups=1)
        sizes["moe"] = dataclasses.replace(config.moe, **experts)
    if hasattr(config.attention, "rank"):
        ranks = {"rank": 128, "query_rank": config.attention.query_rank and 128}
        sizes["attention"] = dataclasses.replace(config.attention, value_dim=128, **ranks)
        sizes |= {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return config.replace(**(sizes | changes))


@functools.cache
def model_of(name, scheme):
    """Random weights, quantized."""
    model = fdq.models.Decoder(config_of(name), rngs=nnx.Rngs(params=0))
    return model if scheme is None else fdq.quantize(model, scheme, method=_method(scheme))


def _method(scheme):
    return None if scheme in ("wint2", "WCC2") else "absmax"


def moved(text):
    """Collectives of a compiled program: kind, elements, and where each comes from."""
    kinds = "all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter"
    found = []
    for line in text.splitlines():
        if (one := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)) is None:
            continue
        sizes = [
            math.prod(map(int, filter(None, shape.split(","))))
            for shape in re.findall(r"\[([\d,]*)\]", one[1])
        ]
        name = re.search('op_name="([^"]*)"', line)
        found.append((one[2], max(sizes), name[1] if name else ""))
    return found


def margin(model, tokens):
    """Between the two largest logits of the token after `tokens`."""
    best = np.sort(np.asarray(model(np.asarray([tokens])))[0, -1])
    return best[-1] - best[-2]


def check_tokens(model, found, expected):
    """Continuations of PROMPTS are the expected ones up to where `model` can hardly decide."""
    for prompt, mine, theirs in zip(PROMPTS, found, expected, strict=True):
        if mine == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        assert margin(model, prompt + theirs[:at]) < 1e-3, (mine, theirs)
