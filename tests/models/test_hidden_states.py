"""What can be looked at inside of a decoder, and put into it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdq.cache.kv_cache import KVCache
from tests.models import oracles

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("qwen3")[0]


@pytest.mark.slow
def test_hidden_states_lead_from_one_to_the_next(model):
    logits, states = model(TOKENS, return_hidden_states=True)
    count = model.config.num_layers
    names = {"embed_tokens", "norm", *(f"layers.{i}" for i in range(count))}
    assert set(states) == names | {f"layers.{i}.self_attn" for i in range(count)}
    assert all(s.shape == (2, 6, model.config.hidden_size) for s in states.values())
    np.testing.assert_array_equal(logits, model(TOKENS))
    np.testing.assert_array_equal(model.head(states["norm"]), logits)
    np.testing.assert_array_equal(model.norm(states[f"layers.{count - 1}"]), states["norm"])
    read = model.layers[1].input_layernorm(states["layers.0"])
    np.testing.assert_array_equal(states["layers.1.self_attn"], read)


def test_embeddings_in_place_of_tokens(model):
    embeds = model.embed_tokens(jnp.asarray(TOKENS), jnp.float32)
    run = jax.jit(lambda embeds: model(inputs_embeds=embeds))
    np.testing.assert_array_equal(run(embeds), jax.jit(model.__call__)(TOKENS))
    cache = KVCache.init(model.config, 2, 8)
    zero = jnp.int32(0)
    extend = jax.jit(lambda tokens, embeds: model.extend(tokens, cache, zero, inputs_embeds=embeds))
    hidden, filled = extend(None, embeds)
    expected, like = extend(jnp.asarray(TOKENS), None)
    np.testing.assert_array_equal(hidden, expected)
    np.testing.assert_array_equal(filled.layers[0].k.codes, like.layers[0].k.codes)
    # Soft prompts are trained through them.
    gradient = jax.grad(lambda e: run(e).sum())(embeds)
    assert gradient.shape == embeds.shape and np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "tokens or inputs_embeds, one of the two"),
        ({"tokens": TOKENS, "inputs_embeds": jnp.ones((2, 6, 64))}, "one of the two"),
        ({"inputs_embeds": jnp.ones((2, 6, 3))}, r"\[B, L, 64\], found float32 of shape \(2, 6, 3"),
        ({"inputs_embeds": jnp.ones((2, 6, 64), jnp.int32)}, "found int32"),
        ({"tokens": TOKENS[0]}, r"integers \[B, L\], found int32 of shape \(6,\)"),
    ],
)
def test_what_is_neither_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_profiles_name_layers_and_ops():
    model = oracles.oracle("ernie4_5_moe")[0]
    cache = KVCache.init(model.config, 2, 8)
    lowered = jax.jit(lambda t, c: model.extend(t, c, jnp.int32(0))).lower(TOKENS, cache)
    text = lowered.as_text(debug_info=True)
    for name in (
        "layers.0/self_attn",
        "layers.1/mlp",
        "embed_tokens",
        "self_attn/attention",
        "self_attn/rope_append",
        "mlp/router/route",
        "mlp/experts/gate_up_proj/grouped_matmul",
        "self_attn/qkv_proj/matmul",
    ):
        assert name in text
