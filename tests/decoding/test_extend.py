"""Several tokens at once are as many steps, whatever the rotation, the window and the cache."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import functional
from fdq.decoding.loop import decode, prefill
from tests.models import oracles

ROTATIONS = {
    "longrope": {"short_factor": (1.0,) * 16, "long_factor": tuple(np.linspace(1.5, 4, 16))},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROTATIONS)
def test_each_token_is_rotated_as_its_own_step(kind):
    """Past the original context of ten tokens, where rotations depend on the length."""
    model, expected = oracles.oracle("qwen3")
    prompts, lengths, tokens, _ = oracles.greedy_batch(expected)
    rotary = dataclasses.replace(
        model.config.rotary, rope_type=kind, original_max_position=10, **ROTATIONS[kind]
    )
    other = nnx.clone(model)
    other.config = dataclasses.replace(model.config, rotary=rotary)
    fns = functional(other)
    step, extend = jax.jit(fns.step), jax.jit(fns.extend)
    given = np.int32([row[:4] for row in tokens])

    def begin():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # longrope says that keys keep their rotation
            return prefill(other, prompts, KVCache.init(model.config, 4, 40), lengths=lengths)

    logits, state = extend(fns.params, given, begin())
    one = begin()
    for i in range(4):
        expected, one = step(fns.params, one)
        np.testing.assert_allclose(logits[:, i], expected, atol=2e-4)
        one = one.push(given[:, i])
    expected, _ = step(fns.params, one)
    after, _ = step(fns.params, state)
    np.testing.assert_allclose(after, expected, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["C8", "C4"])
def test_rollback_through_windows_and_quantized_caches(format):
    model = oracles.oracle("qwen2_window")[0]
    prompts = np.random.default_rng(3).integers(0, 96, (2, 9)).astype(np.int32)
    fns = functional(model)
    step, extend = jax.jit(fns.step), jax.jit(fns.extend)

    def begin():
        return prefill(model, prompts, KVCache.init(model.config, 2, 24, format))

    given = np.int32([[1, 2, 3], [7, 8, 9]])
    logits, state = extend(fns.params, given, begin())
    one = begin()
    for i in range(3):
        expected, one = step(fns.params, one)
        np.testing.assert_allclose(logits[:, i], expected, atol=0.05)
        one = one.push(given[:, i])
    back, like = decode(model, state.rollback(9), 5), decode(model, begin(), 5)
    assert back.generated() == like.generated()
