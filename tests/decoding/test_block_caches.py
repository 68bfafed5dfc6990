"""The decode loop over caches that keep their newest tokens: however it is cut up, the same."""

import jax
import numpy as np
import pytest

from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import functional
from fdq.decoding.loop import decode, prefill
from tests.models import oracles

LENGTHS, SLOTS, STEPS = [41, 33, 7], 75, 20


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("qwen3")[0]


@pytest.fixture(scope="module")
def prompts(model):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (3, max(LENGTHS)))


def start(model, prompts, format, **options):
    cache = KVCache.init(model.config, len(prompts), SLOTS, format)
    return prefill(model, prompts, cache, **options)


@pytest.mark.slow
@pytest.mark.longest
def test_ragged_prompts_in_chunks_are_as_each_alone(model, prompts):
    """With tokens from the end of a block on; calls of the loop that end on its borders or not."""
    format = "C4-kvblock"
    state = start(model, prompts, format, lengths=LENGTHS, chunk=16)
    before = jax.tree.structure(state)
    state = decode(model, state, 9)
    assert jax.tree.structure(state) == before
    found = decode(model, state, STEPS - 9).generated()
    for row, length in enumerate(LENGTHS):
        alone = start(model, prompts[row : row + 1, :length], format)
        assert decode(model, alone, STEPS).generated() == [found[row]]


@pytest.mark.slow
@pytest.mark.longest
def test_a_draft_is_taken_back_and_a_conversation_goes_on(model, prompts):
    fns = functional(model)
    format = "C4-kvblock"

    def state():
        return fns.init(fns.params, prompts[:, :30], 70, format=format)

    wanted = decode(model, state(), 12).generated()
    # The draft ends with its block: had it begun another, codes alone would be left of the first.
    draft = np.concatenate([np.asarray(wanted)[:, :1], prompts[:, :2]], axis=1)
    _, extended = jax.jit(fns.extend)(fns.params, draft, state())
    back = decode(model, extended.rollback(31), 11).generated()
    assert [tokens[:12] for tokens in back] == [tokens[:12] for tokens in wanted]
    # More of a prompt, longer for some than for others.
    more = prefill(model, prompts[:, :9], state=state(), lengths=[9, 0, 4])
    whole = np.concatenate([prompts[:, :30], prompts[:, :9]], axis=1)
    found = decode(model, more, 5).generated()
    for row, length in ((0, 39), (2, 34)):
        alone = start(model, whole[row : row + 1, :length], format)
        assert decode(model, alone, 5).generated() == [found[row]]
