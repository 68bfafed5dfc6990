"""Values that are known are looked at, and shapes always, traced or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from tests.models import oracles

PROMPTS = np.ones((2, 7), np.int32)


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("llama")[0]


def test_traced_lengths_are_one_a_prompt_and_integers(model):
    fns = fdq.functional(model)
    cache = fdq.KVCache.init(model.config, 2, 32)
    uses = (
        lambda n: fns.init(fns.params, PROMPTS, 32, lengths=n).length,
        lambda n: fdq.prefill(model, PROMPTS, cache, lengths=n).length,
    )
    for use in uses:
        for wrong in (jnp.array([3]), jnp.array([3.7, 2.0]), jnp.array([[3, 2]])):
            with pytest.raises(ValueError, match=r"lengths: expected integers of shape \[2\]"):
                jax.jit(use)(wrong)
        assert jax.jit(use)(jnp.array([3, 2])).tolist() == [3, 2]


def test_tokens_that_the_vocabulary_lacks_are_refused_as_far_as_they_are_known(model):
    fns = fdq.functional(model)
    state = fns.init(fns.params, PROMPTS, 32)
    for tokens in (PROMPTS + 100_000, PROMPTS - 2):
        with pytest.raises(ValueError, match="extend: tokens range over"):
            fns.extend(fns.params, tokens, state)
        with pytest.raises(ValueError, match="init: tokens range over"):
            fns.init(fns.params, tokens, 32)
    # Padding is nobody's token.
    padded = np.where(np.arange(7) < 3, PROMPTS, -1)
    assert fns.init(fns.params, padded, 32, lengths=[3, 3]).length.tolist() == [3, 3]


def test_a_state_that_was_donated_says_so(model):
    state = fdq.prefill(model, PROMPTS, fdq.KVCache.init(model.config, 2, 32))
    fdq.decode(model, state, 2)
    if not state.tokens.is_deleted():
        pytest.skip("this platform does not donate")
    with pytest.raises(ValueError, match="this state was donated to an earlier call"):
        fdq.decode(model, state, 2)


def test_a_processor_that_leaves_no_first_token_ends_the_sequence(model):
    nothing = fdq.generate(
        model, PROMPTS.tolist(), 4, logits_processor=lambda logits, _: logits * 0 - jnp.inf
    )
    assert nothing == [[], []]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: m([[1, 2], [3]]), ValueError, "tokens: .* rows of different lengths. Pad them"),
        (
            lambda m: fdq.prefill(m, [[1, 2], [3]], fdq.KVCache.init(m.config, 2, 8)),
            ValueError,
            "prompt tokens: .* rows of different lengths",
        ),
        (lambda m: fdq.calibrate(m, "hello"), TypeError, "expected tokens, found text"),
        (lambda m: fdq.plan(m, "W4A16"), TypeError, "found a Decoder; that of a model is model.c"),
        (
            lambda m: fdq.KVCache.init(m, 1, 8),
            TypeError,
            "expected a DecoderConfig, found a Decoder; a model has one as model.config",
        ),
        (lambda m: fdq.KVCache.init(m.config, 1, 8, 5), TypeError, "KV cache format 5: expected"),
        (lambda m: m(inputs_embeds=[[[0.0] * 64]]), ValueError, "expected an array of floats"),
    ],
)
def test_what_is_no_argument_of_its_kind_is_named(call, error, said, model):
    with pytest.raises(error, match=said):
        call(model)


def test_hidden_states_of_nothing(model):
    logits, states = model(np.zeros((0, 3), np.int32), return_hidden_states=True)
    some = model(np.zeros((1, 3), np.int32), return_hidden_states=True)[1]
    assert logits.shape == (0, 3, model.config.vocab_size)
    assert states.keys() == some.keys()
    assert {name: s.shape[1:] for name, s in states.items()} == {
        name: s.shape[1:] for name, s in some.items()
    }
