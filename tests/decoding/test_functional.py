"""Pure functions and states in research code: several tokens at once, back, apart and together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import functional
from fdq.decoding.generation import generate
from fdq.decoding.loop import decode, prefill
from fdq.decoding.programs import decode as _decode
from fdq.decoding.sampling import Sampling
from tests.models import oracles

SLOTS = 40
LENGTHS = [8, 8, 5, 13]
NEW = 12


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("qwen3")[0]


@pytest.fixture(scope="module")
def batch():
    """Prompts [4, L], and what transformers continues them with."""
    prompts, _, tokens, *_ = oracles.greedy_batch(oracles.oracle("qwen3")[1])
    return prompts, tokens


@pytest.fixture(scope="module")
def fns(model):
    """`functional`, with its functions compiled."""
    made = functional(model)
    return made, jax.jit(made.step), jax.jit(made.extend)


def start(model, prompts, **options):
    cache = KVCache.init(model.config, 4, SLOTS)
    return prefill(model, prompts, cache, lengths=LENGTHS, **options)


@jax.jit
def forward(model, tokens):
    return model(tokens)


def logits_of(model, tokens):
    """Of each position of one sequence, without a cache; one program for all lengths."""
    padded = np.zeros((1, 20), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward(model, padded))[0, : len(tokens)]


def known(state):
    return [row[:n].tolist() for row, n in zip(state.tokens, state.length, strict=True)]


def test_extend_is_steps_and_pushes_of_given_tokens(model, batch, fns):
    prompts, _ = batch
    made, step, extend = fns
    given = np.int32([[5, 6, 7], [9, 9, 1], [0, 95, 3], [44, 2, 80]])
    logits, state = extend(made.params, given, start(model, prompts))
    assert logits.shape == (4, 3, model.config.vocab_size) and logits.dtype == jnp.float32
    slow = start(model, prompts)
    for i in range(3):
        expected, slow = step(made.params, slow)
        np.testing.assert_allclose(logits[:, i], expected, atol=2e-4)
        slow = slow.push(given[:, i])
    assert known(state) == known(slow)
    for a, b in ((s.cache.length, s.length) for s in (state, slow)):
        assert (a == b - 1).all()
    expected, state = decode(model, slow, 4).generated(), decode(model, state, 4)
    assert state.generated() == expected


@pytest.mark.slow
def test_extend_scores_a_batch(model, batch, fns):
    """As the model without a cache does: the log-probability of a continuation."""
    prompts, tokens = batch
    made, _, extend = fns
    given = np.int32([row[:3] for row in tokens])
    logits, _ = extend(made.params, given, start(model, prompts))
    for row, length in enumerate(LENGTHS):
        whole = np.concatenate([prompts[row, :length], given[row]])
        expected = logits_of(model, whole)[length - 1 : -1]
        np.testing.assert_allclose(logits[row], expected, atol=2e-4)


def test_rollback_forgets_a_draft(model, batch, fns):
    prompts, tokens = batch
    made, _, extend = fns
    draft = np.int32([row[:3] for row in tokens])
    draft[1, 1] = (draft[1, 1] + 1) % 96  # accepted: 3, 1, 3, 0
    draft[3, 0] = (draft[3, 0] + 1) % 96
    logits, state = extend(made.params, draft, start(model, prompts))
    agrees = np.asarray(logits.argmax(-1)) == draft
    accepted = agrees.cumprod(axis=1).sum(axis=1)
    assert accepted.tolist() == [3, 1, 3, 0]
    state = state.rollback(np.int32(LENGTHS) + accepted)
    assert [len(row) for row in state.generated()] == [3, 1, 3, 0]
    state = decode(model, state, NEW - 3)
    for row, count in zip(range(4), accepted, strict=True):
        assert state.generated()[row] == tokens[row][: NEW - 3 + count]


def test_rollback_of_a_finished_sequence(model, batch):
    prompts, tokens = batch
    stops = [[tokens[0][2]], [], [], []]
    state = decode(model, start(model, prompts), 6, stop_tokens=stops)
    assert state.finished.tolist() == [True, False, False, False]
    state = state.rollback(state.length - 1)
    assert not state.finished.any()
    assert state.generated()[1] == tokens[1][:5]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "expected 1 to"),
        ([8, 8, 5, 14], "which are known"),
        ([8, 8], r"shape \(4,\)"),
        (2.5, "integers"),
    ],
)
def test_rollback_to_what_was_never_there(model, batch, length, message):
    state = start(model, batch[0])
    with pytest.raises(ValueError, match=message):
        state.rollback(length)


@pytest.mark.slow
def test_extend_at_the_end_of_the_cache(model, batch, fns):
    """What fits is taken and right; the rest is neither taken nor judged."""
    prompts, tokens = batch
    made, _, extend = fns
    cache = KVCache.init(model.config, 4, 14)
    state = prefill(model, prompts, cache, lengths=LENGTHS)
    given = np.int32([row[:3] for row in tokens])
    logits, after = extend(made.params, given, state)
    assert after.length.tolist() == [11, 11, 8, 14]
    assert after.finished.tolist() == [False, False, False, True]
    assert np.isnan(logits[3, 2]).all() and np.isfinite(logits[3, :2]).all()
    assert (logits[:3].argmax(-1) == given[:3]).all()
    assert (logits[3, :2].argmax(-1) == given[3, :2]).all()


def test_a_prompt_in_two_pieces_is_one_prompt(model, batch):
    prompts, tokens = batch
    first = np.int32([3, 8, 5, 1])
    state = prefill(model, prompts, KVCache.init(model.config, 4, SLOTS), lengths=first)
    rest = np.zeros((4, 12), np.int32)
    for row, (done, length) in enumerate(zip(first, LENGTHS, strict=True)):
        rest[row, : length - done] = prompts[row, done:length]
    state = prefill(model, rest, state=state, lengths=np.int32(LENGTHS) - first, chunk=8)
    assert state.length.tolist() == LENGTHS == state.prompt_length.tolist()
    assert decode(model, state, NEW).generated() == [row[:NEW] for row in tokens]


@pytest.mark.slow
def test_a_conversation_goes_on_after_its_end(model, batch):
    """Finished sequences take more of a prompt; the answer is that to all of it."""
    prompts, tokens = batch
    state = decode(model, start(model, prompts), 3, stop_tokens=[[row[2]] for row in tokens])
    assert state.finished.all()
    said = state.generated()[2]
    more = np.int32([[1, 2], [3, 4], [5, 6], [7, 8]])
    state = prefill(model, more, state=state)
    assert not state.finished.any()
    answer = decode(model, state, 2).generated()
    whole = np.concatenate([prompts[2, :5], said, more[2]])[None]
    alone = prefill(model, whole, KVCache.init(model.config, 1, SLOTS))
    assert answer[2] == decode(model, alone, 2).generated()[0]


def test_prefill_refuses_what_it_would_overwrite(model, batch):
    state = start(model, batch[0])
    with pytest.raises(ValueError, match=r"holds \[7, 7, 4, 12\] tokens: .* pass the state"):
        prefill(model, batch[0], state.cache)
    with pytest.raises(ValueError, match="either an empty cache or a state"):
        prefill(model, batch[0])
    with pytest.raises(ValueError, match="has its own keys"):
        prefill(model, batch[0], state=state, key=jax.random.key(1))
    with pytest.raises(ValueError, match="46 tokens does not fit in a cache of 40"):
        prefill(model, np.ones((4, 33), np.int32), state=state)


@pytest.mark.slow
def test_init_is_a_prefill_in_your_own_jit(model, batch):
    prompts, tokens = batch
    fns = functional(model)

    @jax.jit
    def run(params, prompts, lengths):
        state = fns.init(params, prompts, SLOTS, lengths=lengths, format="C16")

        def body(_, state):
            logits, state = fns.step(params, state)
            return state.push(logits.argmax(-1))

        return jax.lax.fori_loop(0, 4, body, state)

    state = run(fns.params, prompts, np.int32(LENGTHS))
    assert state.generated() == [row[:4] for row in tokens]


def test_rows_are_taken_with_all_that_is_theirs(model, batch):
    prompts, tokens = batch
    state = decode(model, start(model, prompts), 3)
    rows = [2, 0, 0, 3]
    state = state.take(rows)
    assert state.generated() == [tokens[row][:3] for row in rows]
    assert decode(model, state, 4).generated() == [tokens[row][:7] for row in rows]
    with pytest.raises(ValueError, match="rows: expected 0 to 3, found"):
        state.take([5])


def test_draws_belong_to_a_sequence_not_to_its_row(model, batch):
    prompts, _ = batch
    warm = Sampling(temperature=1.2)
    state = start(model, prompts, key=jax.random.key(4))
    rows = [3, 1, 0, 2]
    apart = decode(model, state.take(rows), 6, sampling=warm)
    whole = decode(model, state, 6, sampling=warm).generated()
    assert apart.generated() == [whole[row] for row in rows]


def test_copies_draw_apart(model, batch):
    prompts, _ = batch
    warm = Sampling(temperature=1.5)
    state = start(model, prompts, key=jax.random.key(4))
    copies = decode(model, state.take([0, 1]).repeat(2), 6, sampling=warm).generated()
    same = decode(model, state.take([0, 0, 1, 2]), 6, sampling=warm).generated()
    assert same[0] == same[1]
    assert len({tuple(row) for row in copies}) == 4
    twice = state.take([0]).repeat(2).repeat(2)
    assert len({tuple(row) for row in decode(model, twice, 6, sampling=warm).generated()}) == 4
    again = state.take([0, 0, 0, 0]).reseed(jax.random.key(8))
    assert len({tuple(row) for row in decode(model, again, 6, sampling=warm).generated()}) == 4


def test_a_sequence_is_put_into_a_batch(model, batch):
    prompts, tokens = batch
    state = decode(model, start(model, prompts), 3)
    other = start(model, prompts).take([1])
    expected = [row[:7] for row in tokens]
    expected[2] = tokens[1][:4]
    assert decode(model, state.insert(2, other), 4).generated() == expected
    with pytest.raises(ValueError, match="got 2 rows for a cache of 1 sequences"):
        start(model, prompts).insert([0, 1], other)
    with pytest.raises(ValueError, match=r"rows \[1, 1\] name a sequence twice"):
        start(model, prompts).insert([1, 1], start(model, prompts).take([0, 1]))
    with pytest.raises(ValueError, match="keeps no log-probabilities"):
        start(model, prompts, return_logprobs=True).insert(0, other)


def test_another_temperature_compiles_nothing(model, batch):
    decode(model, start(model, batch[0]), 2, sampling=Sampling(temperature=0.5))
    count = _decode._cache_size()
    each = Sampling(temperature=np.float32([0, 0.3, 0.9, 2.0]))
    state = decode(model, start(model, batch[0]), 3, sampling=each)
    assert _decode._cache_size() == count
    assert state.generated()[0] == batch[1][0][:3]  # a temperature of 0 among others


def test_a_processor_rules_tokens_out(model, batch):
    """It sees the state; what it made of the logits is not what log-probabilities are of."""
    prompts = batch[0]

    def odd_positions_only_even_tokens(logits, state):
        even = jnp.arange(logits.shape[-1]) % 2 == 0
        wanted = (state.length % 2 == 0)[:, None] | even[None]
        return jnp.where(wanted, logits, -jnp.inf)

    rows = [prompts[0, :8].tolist(), prompts[2, :5].tolist()]
    out, logprobs = generate(
        model,
        rows,
        5,
        stop_tokens=(),
        logits_processor=odd_positions_only_even_tokens,
        return_logprobs=True,
    )
    for row, new, found in zip(rows, out, logprobs, strict=True):
        logits = logits_of(model, row + new)[len(row) - 1 : -1]
        each = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        np.testing.assert_allclose(found, each[np.arange(5), new], atol=2e-4)
        for position, (token, scores) in enumerate(zip(new, logits, strict=True), len(row)):
            scores = np.where(np.arange(96) % 2 == 0, scores, -np.inf) if position % 2 else scores
            assert token == scores.argmax()
    with pytest.raises(ValueError, match=r"logits_processor: expected logits of shape \(1, 96\)"):
        generate(model, rows[0], 2, logits_processor=lambda logits, state: logits[0])


@pytest.mark.parametrize("nothing", [-np.inf, np.nan], ids=["-inf", "nan"])
def test_a_sequence_that_no_token_may_follow_has_come_to_its_end(model, batch, nothing):
    rows = [batch[0][0, :8].tolist(), batch[0][2, :5].tolist()]

    def ends_at_ten(logits, state):
        return jnp.where((state.length < 10)[:, None], logits, nothing)

    whole = generate(model, rows, 4, stop_tokens=())
    for sampling in (None, Sampling(temperature=1.0, top_k=1)):
        settings = {"stop_tokens": (), "sampling": sampling, "logits_processor": ends_at_ten}
        out = generate(model, rows, 4, **settings)
        assert out == [whole[0][:2], whole[1]]


def test_logprobs_of_a_step_and_of_tokens_that_are_given(model, batch, fns):
    prompts, tokens = batch
    made, step, extend = fns
    given = np.int32([row[:3] for row in tokens])
    state = start(model, prompts, return_logprobs=True)
    with pytest.raises(ValueError, match="push\\(next_token, logits=logits\\)"):
        state.push(given[:, 0])
    _, extended = extend(made.params, given, state)
    for i in range(3):
        logits, state = step(made.params, state)
        state = state.push(given[:, i], logits=logits)
    np.testing.assert_allclose(extended.generated_logprobs(), state.generated_logprobs(), atol=2e-4)
    back = extended.rollback(np.int32(LENGTHS) + 1)
    assert not np.asarray(back.logprobs)[0, LENGTHS[0] + 1 :].any()
    with pytest.raises(ValueError, match="return_logprobs=True"):
        start(model, prompts).generated_logprobs()


def test_params_have_string_keys_alone(model):
    fns = functional(model)
    _, params = fns
    assert (
        repr(fns) == f"Functional({len(jax.tree.leaves(fns))} arrays: step, extend, init, params)"
    )
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    keys = [entry.key for path, _ in paths for entry in path if hasattr(entry, "key")]
    assert keys and all(isinstance(key, str) for key in keys)


def test_a_finished_sequence_takes_nothing(model, batch, fns):
    prompts, tokens = batch
    made, _, extend = fns
    state = start(model, prompts)
    state = dataclasses.replace(state, finished=jnp.asarray([True, False, False, False]))
    given = np.int32([row[:3] for row in tokens])
    logits, after = extend(made.params, given, state)
    assert after.length.tolist() == [8, 11, 8, 16]
    assert np.isnan(logits[0, 1:]).all() and np.isfinite(logits[0, 0]).all()
    assert np.isfinite(logits[1:]).all()


def test_keys_of_the_older_kind_draw_the_same(model, batch):
    warm = Sampling(temperature=1.2)
    drawn = [
        decode(model, start(model, batch[0], key=key).take([1, 0, 3, 2]), 4, sampling=warm)
        for key in (jax.random.key(3), jax.random.PRNGKey(3))
    ]
    assert drawn[0].generated() == drawn[1].generated()
    assert len(start(model, batch[0], key=jax.random.PRNGKey(3)).take([0]).repeat(2).key) == 2


def test_lengths_of_prompts_are_looked_at(model, batch):
    fns = functional(model)
    for lengths in ([0, 8, 5, 13], [14, 8, 5, 13], [8]):
        with pytest.raises(ValueError, match="prompt lengths"):
            fns.init(fns.params, batch[0], SLOTS, lengths=np.int32(lengths))
