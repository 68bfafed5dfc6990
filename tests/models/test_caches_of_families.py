"""gpt-oss and Gemma quantized: caches of every format, and decoding over one in 8 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.cache.kv_cache import KVCache
from tests.covering import longest, slow
from tests.models import oracles

# What a cache may change in logits, root mean square, by their spread: other experts included.
CACHES = {"C16": 1e-5, "C8": 0.02, "Cfp8": 0.1, "C4": 0.5}


@functools.cache
def quantized(name):
    return fdq.quantize(oracles.oracle(name)[0], "W4A16C8-g8")


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *(longest("gpt_oss", cache) for cache in ("C16", "Cfp8", "C4")),
        *(slow(name, "C8") for name in ("gpt_oss", "gemma3")),
        longest("gemma2", "C8"),
    ],
)
def test_what_a_cache_changes_is_its_rounding(name, cache):
    """A prompt longer than the window in one piece, then token by token."""
    model, expected = quantized(name), oracles.oracle(name)[1]
    tokens = jnp.asarray(expected["input_ids"])
    whole = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens))
    stored = KVCache.init(model.config, 2, 24, cache)

    @jax.jit
    def run(model, tokens, stored, start):
        hidden, stored = model.extend(tokens, stored, start)
        return model.head(hidden), stored

    logits, stored = run(model, tokens[:, :20], stored, jnp.int32(0))
    pieces = [logits]
    for at in range(20, 24):
        logits, stored = run(model, tokens[:, at : at + 1], stored, jnp.int32(at))
        pieces.append(logits)
    change = (np.concatenate(pieces, axis=1) - whole).std() / whole.std()
    assert change < CACHES[cache]
    assert cache == "C16" or change > 1e-4


@pytest.mark.parametrize("name", [longest("gemma3"), slow("gpt_oss")])
def test_static_caches_are_calibrated_and_recipes_match(name):
    """Fused layers by their paths; keys and values as the layers make them."""
    model, expected = oracles.oracle(name)
    tokens = expected["input_ids"]
    calibration = fdq.calibrate(model, tokens)
    assert len(calibration.cache) == model.config.num_layers
    rules = fdq.Recipe([("*.qkv_proj", "W8A16"), ("*.down_proj", "W4A16-g8"), ("*", None)])
    made = fdq.quantize(model, rules)
    assert isinstance(made.layers[0].self_attn.qkv_proj.kernel, fdq.QTensor)
    mlp = made.layers[1].mlp
    experts = mlp.experts if name == "gpt_oss" else mlp
    assert isinstance(experts.down_proj.kernel, fdq.QTensor)
    assert not isinstance(experts.gate_up_proj.kernel, fdq.QTensor)
    made = fdq.quantize(model, "W8A16Cfp8-kvhead", calibration=calibration)
    prompt = expected["prompt_short"].tolist()
    assert [len(row) for row in fdq.generate(made, prompt, 4, stop_tokens=())] == [4]
