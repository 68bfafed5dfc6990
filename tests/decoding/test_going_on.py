"""States that go on at their edges: fewer slots, rows that take nothing, the cache's last slots."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fdq.cache.kv_cache import KVCache
from fdq.decoding.loop import decode, prefill
from tests.covering import longest, slow
from tests.models import oracles

SLOTS = 20
FORMATS = pytest.mark.parametrize("format", [slow("C8"), slow("C16"), slow("C4")])


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("qwen3")[0]


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(7).integers(0, 96, (2, SLOTS)).astype(np.int32)


def begin(model, prompts, format, lengths, slots=SLOTS):
    """Of rows that are as wide whatever their lengths, so that one program serves them."""
    cache = KVCache.init(model.config, 2, slots, format)
    return prefill(model, prompts, cache, lengths=lengths, return_logprobs=True)


def tail(state, steps, row):
    """The tokens and log-probabilities that a row was given last."""
    last = slice(int(state.length[row]) - steps, int(state.length[row]))
    return np.asarray(state.tokens)[row, last], np.asarray(state.logprobs)[row, last]


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=2e-3)
    assert (expected[1] < 0).all()


@FORMATS
def test_a_state_with_fewer_slots_is_inserted(model, prompts, format):
    small = decode(model, begin(model, prompts, format, [9, 6], slots=13), 2)
    expected = decode(model, begin(model, prompts, format, [9, 6]), 8)
    state = begin(model, prompts[::-1], format, [7, 8]).insert([1, 0], small)
    assert state.tokens.shape == (2, SLOTS) and state.length.tolist() == [8, 11]
    state = decode(model, state, 6)  # beyond the 13 slots that they had
    for row in (0, 1):
        assert_same(tail(state, 8, 1 - row), tail(expected, 8, row))
    assert state.generated() == expected.generated()[::-1]
    full = decode(model, begin(model, prompts, format, [12, 6], slots=13), 1)
    state = begin(model, prompts[::-1], format, [7, 8]).insert([1, 0], full)
    assert state.finished.tolist() == [False, True] and state.length.tolist() == [7, 13]


@FORMATS
def test_a_row_that_takes_nothing_stays_as_it_is(model, prompts, format):
    state = decode(model, begin(model, prompts, format, [6, 6]), 3)
    more = prompts[:, 10:15]
    expected = decode(model, begin(model, prompts, format, [6, 6]), 8)
    grown = np.array(prompts)
    grown[1, :14] = [*np.asarray(state.tokens)[1, :9], *more[1]]
    state = prefill(model, more, state=state, lengths=[0, 5])
    assert state.length.tolist() == [9, 14] and state.prompt_length.tolist() == [6, 14]
    state = decode(model, state, 5)
    assert_same(tail(state, 8, 0), tail(expected, 8, 0))
    alone = decode(model, begin(model, grown, format, [6, 14]), 5)
    assert_same(tail(state, 5, 1), tail(alone, 5, 1))
    state = begin(model, prompts, format, [6, 6])
    state = dataclasses.replace(state, finished=jnp.array([True, True]))
    state = prefill(model, more, state=state, lengths=[0, 5])
    assert state.finished.tolist() == [True, False] and state.length.tolist() == [6, 11]


@pytest.mark.parametrize(
    ("known", "taken", "format"),
    [
        longest([6, 6], [13, 13], "C8"),
        slow([13, 4], [0, 15], "C8"),
        longest([14, 3], [5, 16], "C8"),
        slow([13, 4], [0, 15], "C4"),
        longest([13, 4], [7, 16], "C16"),
    ],
)
def test_several_chunks_up_to_the_last_slots_of_the_cache(model, prompts, known, taken, format):
    parts = np.zeros((2, max(taken)), np.int32)
    for row, prompt, start, count in zip(parts, prompts, known, taken, strict=True):
        row[:count] = prompt[start : start + count]
    state = begin(model, prompts, format, known)
    state = prefill(model, parts, state=state, lengths=taken, chunk=4)
    lengths = np.add(known, taken)
    assert state.length.tolist() == lengths.tolist() and (state.cache.length == lengths - 1).all()
    assert state.finished.tolist() == [n == SLOTS for n in lengths]
    whole = begin(model, prompts, format, lengths)
    for _ in range(SLOTS - max(lengths)):
        state, whole = decode(model, state, 1), decode(model, whole, 1)
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(state.tokens[row, :n], prompts[row, :n])
        if steps := SLOTS - max(lengths):
            assert_same(tail(state, steps, row), tail(whole, steps, row))
    for mine, other in zip(state.cache.layers, whole.cache.layers, strict=True):
        for a, b in zip(mine, other, strict=True):
            for row, n in enumerate(lengths):
                found, expected = (np.asarray(x.dequantize())[row, :, : n - 1] for x in (a, b))
                np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())
