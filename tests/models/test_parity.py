"""Every family against transformers: logits, and greedy tokens through the KV cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq.models
from fdq.cache.kv_cache import KVCache
from fdq.decoding.loop import decode, prefill
from tests.covering import covering, longest, slow
from tests.models import oracles

VARIANTS = ("_bias", "_nonorm", "_plain", "_untied")

one_of_each_family = pytest.mark.parametrize(
    "name",
    covering(
        oracles.NAMES,
        # Seed-OSS is Llama with other defaults.
        lambda name: (
            oracles.read_config(name)["model_type"].replace("seed_oss", "llama"),
            name.endswith("window"),
        ),
    ),
)


@one_of_each_family
def test_logits(name):
    model, expected = oracles.oracle(name)
    logits = jax.jit(lambda model, tokens: model(tokens))(model, expected["input_ids"])
    assert logits.dtype == jnp.float32
    assert np.std(expected["logits"]) > 0.3
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "qwen2_window" else (longest if name.endswith(VARIANTS) else slow)(name)
        for name in oracles.NAMES
    ],
)
def test_greedy_tokens_through_the_cache(name):
    """Four prompts of three lengths in one batch, each as transformers continues it alone."""
    model, expected = oracles.oracle(name)
    prompts, lengths, tokens, _ = oracles.greedy_batch(expected)
    cache = KVCache.init(model.config, 4, 32)
    assert cache.layers[0].k.codes.dtype == jnp.float32
    state = prefill(model, prompts, cache, lengths=lengths)
    assert decode(model, state, steps=16).generated() == tokens


@pytest.mark.parametrize("name", oracles.NAMES)
def test_both_spellings_of_the_config_mean_the_same(name):
    new, old = (oracles.read_config(name, f) for f in ("config.json", "config_v4.json"))
    assert new != old
    assert fdq.models.from_huggingface(new) == fdq.models.from_huggingface(old)
