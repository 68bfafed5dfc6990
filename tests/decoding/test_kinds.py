"""Values of another kind than decoding takes: refused by name, not rounded, cut or broadcast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.decoding.loop import stop_table
from tests.models import oracles


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("qwen3")[0]


@pytest.fixture(scope="module")
def state(model):
    tokens = np.array([[1, 5, 6], [1, 7, 8]])
    return fdq.prefill(model, tokens, fdq.KVCache.init(model.config, 2, 32))


def cache(model, **changes):
    fields = {"batch": 1, "max_length": 8, "format": "C16"} | changes
    return fdq.KVCache.init(model.config, **fields)


WRONG_PROMPTS = {
    "bytes": (b"abc", "prompts: expected text or a list of tokens, found b'abc'"),
    "bytes of each": ([b"abc"], "prompt 0: expected text or a list of tokens, found b'abc'"),
    "a number": (5, "prompts: expected text or a list of tokens, found 5"),
    "nothing": (None, "prompts: expected text or a list of tokens, found None"),
    "messages": ([{"role": "user"}], "prompt 0: expected text or a list of tokens, found {'role'"),
    "booleans": ([[True]], "prompt 0: expected an integer, found True"),
}


@pytest.mark.parametrize("kind", WRONG_PROMPTS)
def test_prompts_are_text_or_tokens(model, kind):
    prompts, message = WRONG_PROMPTS[kind]
    with pytest.raises(TypeError, match=message):
        fdq.generate(model, prompts, 2)


def test_one_prompt_may_be_an_array(model):
    expected = fdq.generate(model, [[5, 6, 7]], 2, stop_tokens=())
    for prompt in (np.array([5, 6, 7]), jnp.array([5, 6, 7]), list(jnp.array([5, 6, 7]))):
        assert fdq.generate(model, prompt, 2, stop_tokens=()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampling": 0.7}, r"Did you mean fdq\.Sampling\(temperature=0\.7\)"),
        ({"sampling": {"top_k": 3}}, r"Did you mean fdq\.Sampling\(\*\*\{'top_k': 3\}\)"),
        ({"stream": "stdout"}, "stream: expected a function, found 'stdout'"),
        ({"logits_processor": 3}, "logits_processor: expected a function, found 3"),
        ({"key": np.zeros(3, np.uint32)}, "key: expected one PRNG key"),
        ({"max_new_tokens": True}, "max_new_tokens: expected an integer, found True"),
    ],
)
def test_arguments_of_generate(model, given, message):
    with pytest.raises(TypeError, match=message):
        fdq.generate(model, [[1, 2]], **({"max_new_tokens": 2} | given))


def test_stop_tokens_of_every_spelling():
    expected = [[2, 3], [2, 3]]
    for one in ([2, 3], (2, 3), {2, 3}, np.array([2, 3]), jnp.array([2, 3])):
        assert stop_table(one, 2).tolist() == expected
        assert stop_table([one, one], 2).tolist() == expected
    assert stop_table(jnp.array(expected), 2).tolist() == expected
    for wrong in ("</s>", ["</s>", "</s>"], [[2], 3]):
        with pytest.raises(TypeError, match="stop_tokens: expected"):
            stop_table(wrong, 2)


def test_a_top_k_beyond_every_vocabulary_is_all_of_it():
    assert fdq.Sampling(top_k=10**12).for_batch(1) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": -1}, "batch: expected a whole number of at least 0, found -1"),
        ({"batch": 1.0}, r"batch: expected a whole number of at least 0, found 1\.0"),
        ({"max_length": "64"}, "max_length: expected a whole number of at least 1, found '64'"),
        ({"max_length": 0}, "max_length: expected a whole number of at least 1, found 0"),
        ({"dtype": "int8"}, "KV cache dtype int8: expected float32, bfloat16 or float16"),
        ({"dtype": "float8_e4m3fn"}, "KV cache dtype float8_e4m3fn: expected float32"),
    ],
)
def test_a_cache_has_whole_sizes_and_a_dtype_that_holds_keys(model, changes, message):
    with pytest.raises(ValueError, match=message):
        cache(model, **changes)


def test_tokens_are_never_rounded(model, state):
    fns = fdq.functional(model)
    floats = np.array([[1.9], [2.9]])
    one = floats[:, 0]
    wrong = {
        "next_token: expected integers of shape .2., found float64": lambda: state.push(
            floats[:, 0]
        ),
        "next_token: .* of shape .2, 1.": lambda: state.push(floats.astype(int)),
        "next_token: .* of shape .1.": lambda: state.push(np.array([9])),
        "extend: tokens: .* found float64": lambda: fns.extend(fns.params, floats, state),
        "extend: tokens: .* of shape .2.": lambda: fns.extend(fns.params, [1, 2], state),
        "init: tokens: .* found float64": lambda: fns.init(fns.params, floats, 8),
        "prompt lengths: .* found float64": lambda: fdq.prefill(
            model, [[1, 2]], cache(model), lengths=[1.5]
        ),
        "prompt lengths: .* found bool": lambda: fdq.prefill(
            model, [[1, 2]], cache(model), lengths=[True]
        ),
        "rollback: expected an integer": lambda: state.cache.rollback(1.7),
        "rollback: expected .* of shape .3,.": lambda: state.cache.rollback([1, 1, 1]),
        "rows: expected a list of rows, found 0 axes": lambda: state.take(1),
        "rows: expected a list of rows, found 2 axes": lambda: state.take([[0], [1]]),
        "count: expected a whole number": lambda: state.cache.repeat(1.5),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    # The same of what is traced: dtypes and shapes are known.
    with pytest.raises(ValueError, match="next_token: expected integers"):
        jax.jit(lambda state, token: state.push(token).tokens)(state, one)
    assert state.push([3, 4], [4]).finished.tolist() == [False, True]


def test_a_cache_is_no_state_and_a_name_no_cache(model, state):
    fns = fdq.functional(model)
    for call in (
        lambda: fdq.decode(model, state.cache, 2),
        lambda: fns.step(fns.params, state.cache),
        lambda: state.insert([0, 1], state.cache),
    ):
        with pytest.raises(TypeError, match=r"expected the fdq\.DecodeState .* found a KVCache"):
            call()
    with pytest.raises(TypeError, match=r"prefill: expected a fdq\.KVCache, .*found 'C8'"):
        fdq.prefill(model, [[1, 2]], "C8")


def test_a_model_is_asked_about_its_own_vocabulary(model):
    size = model.config.vocab_size
    for tokens in ([[1, size]], jnp.array([[-1, 1]])):
        with pytest.raises(ValueError, match=rf"tokens range over .*, expected 0 ... {size - 1}"):
            model(tokens)
    with pytest.raises(ValueError, match=r"tokens: expected integers \[B, L\], found <U5"):
        model("hello")
