"""Layers with a sliding window keep little more than it; what comes out is that of a full cache."""

import functools

import jax
import numpy as np
import pytest

import fdq
from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import functional
from fdq.decoding.loop import decode, prefill
from tests.covering import longest, slow
from tests.models import oracles

LENGTH = 80


@functools.cache
def model_of(name):
    return oracles.oracle(name)[0]


def caches(model, batch, format="C8"):
    """A cache with rings of 16 slots for a window of 6, and one without."""
    made = [KVCache.init(model.config, batch, LENGTH, format, spare=n) for n in (4, LENGTH)]
    windows = [layer.k.window for layer in made[0].layers]
    assert windows == [model.config.sliding_window(layer) for layer in range(len(windows))]
    assert made[1].reach is None and made[1].spare is None
    return made


def prompts(rng, model, *lengths):
    tokens = rng.integers(0, model.config.vocab_size, (len(lengths), max(lengths)))
    return tokens.astype(np.int32), np.int32(lengths)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *(longest("qwen2_window", one) for one in ("C8", "C16", "Cfp8", "C4")),
        *(slow(*one) for one in (("gemma3", "C16"), ("gpt_oss", "C8"))),
    ],
)
def test_ragged_prompts_in_chunks_go_on_and_are_decoded(rng, name, format):
    """Pieces longer and shorter than rings; rows that end early write nothing into theirs."""
    model = model_of(name)
    tokens, lengths = prompts(rng, model, 65, 3, 20)
    more, others = prompts(rng, model, 6, 13, 0)
    tokens_of = []
    for cache in caches(model, 3, format):
        state = prefill(model, tokens, cache, lengths=lengths, chunk=32)
        state = decode(model, state, 6)
        found = [state.generated()]
        # 13 tokens more than the longest has do not fit: they begin earlier, on known ones.
        state = prefill(model, more, state=state, lengths=others, chunk=16)
        state = decode(model, state, 3)
        tokens_of.append([*found, state.generated()])
    assert tokens_of[0] == tokens_of[1]
    assert len({token for row in tokens_of[0][0] for token in row}) > 3


@pytest.mark.slow
def test_what_a_ring_no_longer_holds_is_refused(rng):
    model = model_of("qwen2_window")
    fns = functional(model)
    extend = jax.jit(fns.extend)
    tokens, _ = prompts(rng, model, 40, 40)
    given = np.int32([[5, 6, 7, 8], [9, 1, 2, 3]])
    results = []
    for cache in caches(model, 2):
        state = prefill(model, tokens, cache)
        logits, state = extend(fns.params, given, state)
        back = decode(model, state.rollback([40, 42]), 5)
        results.append((np.asarray(logits), back.generated(), back))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-4)
    assert results[0][1] == results[1][1]
    ring, full = (result[2] for result in results)
    assert full.rollback(10).length.tolist() == [10, 10]
    # 44 and 46 tokens were the most that were in the cache, the last one of 45 and 47 was not.
    assert ring.rollback([41, 43]).length.tolist() == [41, 43]
    with pytest.raises(ValueError, match=r"rollback to \[38, 42\] tokens: layers .* by 5 tokens"):
        ring.rollback([39, 43])
    with pytest.raises(ValueError, match="extend: got 6 tokens, .* take 5 at once"):
        fns.extend(fns.params, np.zeros((2, 6), np.int32), ring)


@pytest.mark.slow
@pytest.mark.longest
def test_rows_are_taken_and_put_into_rings(rng):
    """A short prompt, whose cache has no ring, and a long one, whose cache has."""
    model = model_of("qwen2_window")
    state = prefill(model, prompts(rng, model, 30, 30)[0], caches(model, 2)[0])
    long = prefill(model, prompts(rng, model, 50)[0], caches(model, 1)[0])
    short = prefill(
        model, prompts(rng, model, 11)[0], KVCache.init(model.config, 1, 14, "C8", spare=4)
    )
    assert short.cache.reach is None
    alone = decode(model, long.take([0, 0]), 9).generated()[0]
    both = decode(model, state.insert(1, long).take([1, 0, 1]), 9)
    assert both.generated()[0] == both.generated()[2] == alone
    full = caches(model, 1)[1]
    like = decode(model, prefill(model, short.tokens[:, :11], full), 9).generated()[0]
    put = decode(model, both.insert(2, short), 9)
    assert put.generated()[2] == like and put.cache.reach.tolist() == [67, 47, 19]
    with pytest.raises(ValueError, match="ring of 32 slots does not go into 16 slots"):
        both.cache.insert(0, KVCache.init(model.config, 1, LENGTH, "C8", spare=12))


@pytest.mark.slow
def test_one_pass_reads_more_than_a_ring_holds(rng):
    model = model_of("qwen2_window")
    step, params = fns = functional(model)
    tokens, lengths = prompts(rng, model, 45, 8)
    init = jax.jit(fns.init, static_argnums=2, static_argnames="format")
    state = init(params, tokens, 700, lengths=lengths, format="C8")
    assert state.cache.layers[1].k.codes.shape[2] == 528 and state.cache.spare == 261
    assert state.cache.layers[0].k.codes.shape[2] == state.capacity == 700
    assert state.cache.reach.tolist() == [44, 8]
    like = prefill(model, tokens, caches(model, 2)[1], lengths=lengths)
    np.testing.assert_allclose(step(params, state)[0], step(params, like)[0], atol=1e-5)


def test_memory_of_windows_does_not_grow(rng):
    """The plan and `nbytes` count rings; a cache that rings make small enough is not refused."""
    config = model_of("qwen2_window").config

    def init(length, **settings):
        return jax.eval_shape(lambda: KVCache.init(config, 2, length, "C8", **settings))

    grown = init(100_000).nbytes - init(10_000).nbytes
    of_a_token = 2 * 2 * config.num_kv_heads * (config.head_dim + 4)  # batch, halves
    assert grown == 90_000 * of_a_token
    assert init(100_000).max_length == 100_000
    assert init(10_000, spare=10_000).nbytes == 3 * 10_000 * of_a_token
    assert init(500).reach is None and init(529).reach is not None
    windows = config.replace(sliding_windows=(6, 6, 6))
    made = KVCache.init(windows, 1, 10**9, "C8")
    assert made.nbytes == 3 * 528 * of_a_token // 2 and made.max_length == 10**9
    plan = fdq.plan(config, "W8A16C8", context=100_000)
    assert plan.cache_bytes == KVCache.init(config, 1, 100_000, "C8").nbytes
    with pytest.raises(ValueError, match="spare: expected a whole number of at least 1"):
        KVCache.init(config, 1, 100, spare=0)
