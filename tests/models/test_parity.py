"""Every family against transformers: logits, and greedy tokens through the KV cache."""

import jax
import jax.numpy as jnp
import numpy as np

import fdq.models
from fdq.decode import decode, prefill
from fdq.kv_cache import KVCache


def test_logits(load_oracle, oracle_name):
    model, expected = load_oracle(oracle_name)
    logits = jax.jit(lambda model, tokens: model(tokens))(model, expected["input_ids"])
    assert logits.dtype == jnp.float32
    assert np.std(expected["logits"]) > 0.3
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


def test_greedy_tokens_through_the_cache(load_oracle, oracle_name):
    """Four prompts of three lengths in one batch, each as transformers continues it alone."""
    model, expected = load_oracle(oracle_name)
    prompts, tokens = [], []
    for suffix in ("", "_short", "_long"):
        prompts += list(expected["prompt" + suffix])
        tokens += expected["greedy" + suffix].tolist()
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = KVCache.init(model.config, len(prompts), 32)
    assert cache.k[0].dtype == jnp.float32
    state = prefill(model, padded, cache, lengths=list(map(len, prompts)))
    state = decode(model, state, steps=16)
    assert state.generated() == tokens


def test_both_spellings_of_the_config_mean_the_same(oracle_config, oracle_name):
    new, old = (oracle_config(oracle_name, f) for f in ("config.json", "config_v4.json"))
    assert new != old
    assert fdq.models.from_huggingface(new) == fdq.models.from_huggingface(old)
