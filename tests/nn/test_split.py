"""A module becomes a template and params, as it is now: what has changed since counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fdq
from fdq.nn.parameters import _SEEN, current_split, split
from tests.models import oracles


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("qwen3")[0]


def test_a_split_is_not_made_anew(model):
    current_split(model)
    seen = _SEEN[model]
    template, _ = current_split(model)
    assert seen is not None and _SEEN[model] is seen and template is seen.template


def test_what_changes_in_a_model_is_seen(model):
    """Arrays, modules and plain attributes: the split is not one of earlier."""
    clone = nnx.clone(model)
    for change in (
        lambda: None,
        lambda: clone.norm.scale.set_value(clone.norm.scale.get_value() * 2),
        lambda: setattr(clone.norm, "epsilon", 0.5),
        lambda: setattr(clone.layers[1], "mlp", clone.layers[0].mlp),
        lambda: setattr(clone.norm, "scale", nnx.Param(jnp.ones(3))),
        lambda: setattr(clone, "config", dataclasses.replace(clone.config, dtype="bfloat16")),
        lambda: setattr(
            clone.layers[0].self_attn,
            "qkv_proj",
            fdq.quantize(clone, "W8A16").layers[0].self_attn.qkv_proj,
        ),
    ):
        change()
        for _ in range(2):
            (template, params), (expected, like) = current_split(clone), split(clone)
            assert template == expected and hash(template) == hash(expected)
            assert jax.tree.structure(params) == jax.tree.structure(like)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(like), strict=True):
                assert a is b
