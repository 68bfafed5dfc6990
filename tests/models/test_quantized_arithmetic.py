"""Whole quantized models against NumPy in float64, which quantizes activations by definition.

How far a scheme moves the logits of a random model is the format's own error; that the two agree to
float32 rounding says that nothing else was added, router and experts included.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.decoding.functional import functional
from fdq.decoding.loop import prefill
from tests.closeness import assert_close
from tests.covering import longest, slow
from tests.models import oracles
from tests.models.emulation import emulated


@jax.jit
def forward(model, tokens):
    return model(tokens)


def assert_agree(found, logits):
    """Logits [..., vocab] of many tokens agree to float32 rounding, and of all of them closely.

    Where an activation lies between two codes, rounding in float32 may pick the other one: that
    token, and a little those after it, are a step of one code away.
    """
    assert_close(found, logits, of_largest=0.05)
    error = np.abs(np.asarray(found, np.float64) - logits).max(-1)
    assert np.quantile(error, 0.25) < 1e-5 * np.abs(logits).max()


def test_the_emulation_is_the_model():
    model, expected = oracles.oracle("ernie4_5_moe")
    assert_close(emulated(model, expected["input_ids"]), expected["logits"], of_largest=1e-5)


@pytest.mark.parametrize("scheme", [longest("W4A8-g16"), slow("Wfp8Afp8")])
def test_a_model_is_its_definition(scheme):
    """All positions at once, and the last ones a token at a time through the cache."""
    model, expected = oracles.oracle("ernie4_5_moe")
    tokens = expected["input_ids"]
    model = fdq.quantize(model, scheme, method="absmax")
    logits = emulated(model, tokens)
    added = np.sqrt(((logits - expected["logits"]) ** 2).mean()) / expected["logits"].std()
    assert added > 0.05
    assert_agree(forward(model, tokens), logits)
    first = tokens.shape[1] - 3
    cache = fdq.KVCache.init(model.config, len(tokens), tokens.shape[1])
    state = prefill(model, tokens[:, :first], cache)
    step, params = functional(model)
    step = jax.jit(step)
    last = []
    for position in range(first, tokens.shape[1]):
        found, state = step(params, state)
        last.append(found)
        state = state.push(jnp.asarray(tokens[:, position]))
    assert_agree(np.stack(last, axis=1), logits[:, first - 1 : -1])
