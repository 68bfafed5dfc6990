"""The decode loop: equal to no cache at all, however it is cut up, and in place."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdq.cache.kv_cache import KVCache
from fdq.calibration.observation import calibrate
from fdq.decoding.functional import functional
from fdq.decoding.generation import generate
from fdq.decoding.loop import decode, prefill, stop_table
from fdq.decoding.programs import decode as _decode
from fdq.decoding.programs import extend as _extend
from fdq.decoding.sampling import Sampling
from fdq.nn import split
from fdq.schemes.scheme import CacheSpec
from tests.covering import slow
from tests.models import oracles

SLOTS = 48
STEPS = 16
ORACLE = "qwen3"
BATCH = 4


@pytest.fixture(scope="module")
def model():
    return oracles.oracle(ORACLE)[0]


@pytest.fixture(scope="module")
def batch():
    """Prompts [4, L], lengths, what transformers continues them with, and by which margin."""
    return oracles.greedy_batch(oracles.oracle(ORACLE)[1])


@pytest.fixture(scope="module")
def prompts(batch):
    return batch[0]


@pytest.fixture(scope="module")
def tokens(batch):
    return batch[2]


CONFIG = oracles.oracle_config(ORACLE)
LENGTHS = [8, 8, 5, 13]


def start(model, prompts, format="C16", **options):
    cache = KVCache.init(model.config, BATCH, SLOTS, format)
    return prefill(model, prompts, cache, lengths=LENGTHS, **options)


def test_greedy_equals_no_cache(model, prompts, tokens):
    state = decode(model, start(model, prompts), STEPS)
    assert state.generated() == tokens
    assert state.length.tolist() == [n + STEPS for n in LENGTHS]
    assert state.cache.length.tolist() == [n + STEPS - 1 for n in LENGTHS]


STATIC = [
    CacheSpec(format="int8", granularity="channel", dynamic=False),
    CacheSpec(format="float8_e4m3", granularity="head", dynamic=False),
    CacheSpec(format="int4", granularity="channel", dynamic=False, zero_point=True),
]
# Root mean square of what a format adds to the logits, relative to their standard deviation:
# 1.5 times what was measured (this model's attention is sharp: a trained one's logits move less).
ADDED = {"int8": 0.018, "float8_e4m3": 0.085, "int4": 0.25}
CACHES = ["C8", slow("Cfp8"), slow("C4"), slow(STATIC[0]), slow(STATIC[1]), STATIC[2]]
CACHES += [slow("C4-kvcentered")]


@pytest.mark.parametrize("format", CACHES, ids=str)
def test_every_cache_format_chooses_the_same_tokens(model, format):
    """Where the gap between the two best logits exceeds four times what the format adds."""
    expected = oracles.oracle(ORACLE)[1]
    text, logits = expected["input_ids"], expected["logits"]
    spec = CacheSpec.parse(format) if isinstance(format, str) else format
    scales = calibrate(model, text).cache_scales(spec) if spec.calibrated else None
    cache = KVCache.init(CONFIG, *text.shape, spec, scales=scales)

    @jax.jit
    def forward(model, text, cache):
        hidden, _ = model.extend(text, cache, jnp.zeros((2,), jnp.int32))
        return model.head(hidden)

    added = np.asarray(forward(model, text, cache)) - logits
    noise = np.sqrt((added**2).mean())
    assert 1e-4 < noise / logits.std() < ADDED[spec.format]
    best = np.sort(logits, axis=-1)
    sure = best[..., -1] - best[..., -2] > 4 * noise
    assert sure.sum() >= 2
    assert ((added + logits).argmax(-1) == logits.argmax(-1))[sure].all()


def test_chunked_prefill_equals_unchunked(model, prompts):
    """Keys and values agree to rounding whatever the chunk, quantized ones to one step."""
    for format, tolerance in (("C16", 1e-4), ("C8", 1.0)):
        whole = start(model, prompts, format)
        cut = start(model, prompts, format, chunk=5)
        for row, length in enumerate(LENGTHS):
            for name in ("k", "v"):
                a, b = (
                    np.asarray(codes[row, :, : length - 1], np.float32)
                    for codes in (getattr(s.cache.layers[1], name).codes for s in (whole, cut))
                )
                np.testing.assert_allclose(a, b, atol=tolerance)
                assert a.any()
        assert (cut.tokens == whole.tokens).all()
        assert cut.cache.length.tolist() == [n - 1 for n in LENGTHS]


def test_a_prompt_alone_and_in_a_batch(model, prompts, tokens):
    """Also checks that a chunk never runs over the end of a cache that is just long enough."""
    cache = KVCache.init(model.config, 1, 13 + STEPS)
    state = prefill(model, prompts[3:], cache)
    assert decode(model, state, STEPS).generated() == [tokens[3]]


def test_sampling_is_independent_of_batch_and_calls(model, prompts):
    sampling = Sampling(temperature=0.9, top_k=20)
    key = jax.random.key(5)
    whole = decode(model, start(model, prompts, key=key), 8, sampling=sampling)
    cut = start(model, prompts, key=key)
    for _ in range(2):
        cut = decode(model, cut, 4, sampling=sampling)
    assert cut.generated() == whole.generated()
    first = prefill(model, prompts[:1, :8], KVCache.init(CONFIG, 1, SLOTS), key=key)
    assert decode(model, first, 8, sampling=sampling).generated() == whole.generated()[:1]
    other = decode(model, start(model, prompts, key=jax.random.key(6)), 8, sampling=sampling)
    assert other.generated() != whole.generated()


def test_own_jit_and_scan_over_step(model, prompts, tokens):
    step, params = functional(model)

    @jax.jit
    def run(params, state):
        def body(state, _):
            logits, state = step(params, state)
            return state.push(logits.argmax(-1)), logits

        return jax.lax.scan(body, state, None, length=STEPS)

    state, logits = run(params, start(model, prompts))
    assert state.generated() == tokens
    assert logits.shape == (STEPS, BATCH, CONFIG.vocab_size) and logits.dtype == jnp.float32
    expected = decode(model, start(model, prompts), STEPS)
    assert (state.tokens == expected.tokens).all()


def test_model_as_an_argument_of_jit(model, prompts, tokens):
    @jax.jit
    def run(model, prompts):
        cache = KVCache.init(model.config, BATCH, SLOTS)
        state = prefill(model, prompts, cache, lengths=jnp.array(LENGTHS))
        step, params = functional(model)
        logits, state = step(params, state)
        return decode(model, state.push(logits.argmax(-1)), STEPS - 1)

    state = run(model, jnp.asarray(prompts))
    assert state.generated() == tokens


def test_vmap_over_step(model, prompts):
    """States stacked along a new axis step like the states one by one."""
    step, params = functional(model)
    states = [start(model, p, key=jax.random.key(1)) for p in (prompts, np.roll(prompts, 1, 0))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    logits, after = jax.jit(jax.vmap(step, in_axes=(None, 0)))(params, stacked)
    for i, state in enumerate(states):
        one, expected = jax.jit(step)(params, state)
        np.testing.assert_allclose(logits[i], one, atol=1e-5)
        codes, expected = (s.cache.layers[1].k.codes for s in (after, expected))
        np.testing.assert_allclose(codes[i], expected, atol=1e-5)


def test_a_step_may_be_repeated(model, prompts):
    step, params = functional(model)
    once = jax.jit(step)
    first, state = once(params, start(model, prompts))
    again, _ = once(params, state)
    assert (first == again).all()


def test_nothing_is_compiled_twice(model, prompts):
    decode(model, start(model, prompts), STEPS)
    counts = (_decode._cache_size(), _extend._cache_size())
    decode(model, start(model, prompts), STEPS)
    clone = nnx.clone(model)
    state = decode(clone, start(clone, prompts), STEPS)
    assert (_decode._cache_size(), _extend._cache_size()) == counts
    # What changes in a model counts from the next call on.
    clone.norm.scale.set_value(-clone.norm.scale.get_value())
    changed = decode(clone, start(clone, prompts), STEPS)
    assert changed.generated() != state.generated()
    assert (_decode._cache_size(), _extend._cache_size()) == counts


def copied(state):
    """For a call that takes its state."""
    return jax.tree.map(jnp.copy, state)


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_steps_in_an_inner_loop_are_steps(model, prompts, count):
    """As on GPUs: those that are too many leave no trace, in what is finished or not."""
    template, params = split(model)
    stops = jnp.full((len(prompts), 1), -1, jnp.int32)
    begun = decode(model, start(model, prompts), 1)
    stops = stops.at[0, 0].set(decode(model, copied(begun), 2).tokens[0, begun.length[0] + 1])
    one, inner = (
        _decode(template, params, copied(begun), stops, None, None, jnp.int32(count), a_trip=n)
        for n in (1, 4)
    )
    assert bool(one.finished[0]) == (count > 1) and not one.finished[1:].any()
    small, same = (dataclasses.replace(state, cache=None, key=None) for state in (one, inner))
    jax.tree.map(np.testing.assert_array_equal, small, same)
    np.testing.assert_array_equal(one.cache.length, inner.cache.length)
    one, inner = (decode(model, state, 2, stop_tokens=()) for state in (one, inner))
    assert one.generated() == inner.generated()


def test_stop_tokens(model, prompts, tokens):
    """A sequence ends with its own stop token; the others go on as if nothing had happened."""
    stop = tokens[0][3]
    end = tokens[0].index(stop) + 1
    stops = [[stop, 2], [], [], []]
    state = decode(model, start(model, prompts), STEPS, stop_tokens=stops)
    assert state.generated() == [tokens[0][:end], *tokens[1:]]
    assert state.finished.tolist() == [True, False, False, False]
    again = decode(model, state, 4, stop_tokens=stops)
    assert again.generated()[0] == tokens[0][:end]
    assert [len(g) for g in again.generated()[1:]] == [STEPS + 4] * 3


def test_stop_table():
    assert stop_table((), 2).shape == (2, 0)
    assert stop_table(5, 2).tolist() == [[5], [5]]
    assert stop_table((5, 6), 2).tolist() == [[5, 6], [5, 6]]
    assert stop_table([[5], [6, 7]], 2).tolist() == [[5, -1], [6, 7]]
    with pytest.raises(ValueError, match="for 1 sequences, expected 2"):
        stop_table([[5]], 2)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (np.ones((1, SLOTS + 1), np.int32), None, f"{SLOTS + 1} tokens does not fit .* {SLOTS}"),
        (np.ones((2, 4), np.int32), None, "2 prompts for a cache of 1"),
        (np.ones((1, 4), np.int32), [5], r"\[5\] must be between 1 and 4"),
        (np.ones((1, 4), np.int32), [0], r"\[0\] must be between 1 and 4"),
        (np.full((1, 4), 96), None, r"96 \.\.\. 96, expected 0 \.\.\. 95"),
        (np.full((1, 4), -1), None, r"-1 \.\.\. -1"),
        (np.ones((1, 4), np.float32), None, "expected integers"),
        (np.ones((4,), np.int32), None, "expected integers of shape"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(model, tokens, lengths, message):
    cache = KVCache.init(CONFIG, 1, SLOTS)
    with pytest.raises(ValueError, match=message):
        prefill(model, tokens, cache, lengths=lengths)
    assert not cache.layers[0].k.codes.is_deleted()


def test_too_many_steps(model, prompts):
    with pytest.raises(ValueError, match=f"{SLOTS} more tokens after 13 do not fit"):
        decode(model, start(model, prompts), SLOTS)


def test_a_full_cache_ends_a_sequence(model, prompts):
    """A prompt as long as the cache is accepted, and finished; push never runs over the end."""
    state = prefill(model, prompts[3:], KVCache.init(CONFIG, 1, 13))
    assert state.finished.tolist() == [True]
    assert decode(model, state, 3).generated() == [[]]


def test_generate_tokens(model, prompts, tokens):
    rows = [p[:n].tolist() for p, n in zip(prompts, LENGTHS, strict=True)]
    pieces = [[] for _ in rows]
    out = generate(
        model,
        rows,
        STEPS,
        stop_tokens=(),
        stream=lambda index, piece: pieces[index].extend(piece),
        stream_steps=8,
    )
    assert out == tokens == pieces
    stop = tokens[1][5]
    stops = [[], [stop], [], []]
    stopped = generate(model, rows, STEPS, stop_tokens=stops, stream_steps=8)
    expected = tokens[1][: tokens[1].index(stop)]
    assert stopped == [tokens[0], expected, *tokens[2:]]
    # One list of tokens is a batch of one; a cache that is just long enough is.
    assert generate(model, rows[0], 4, stop_tokens=(), max_length=12) == [tokens[0][:4]]


def test_generate_stops_at_the_models_end_token(model, prompts, tokens):
    ending = nnx.clone(model)
    ending.config = dataclasses.replace(CONFIG, eos_token_ids=(tokens[0][2],))
    assert generate(ending, prompts[:1, :8], 4) == [tokens[0][:2]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        (["a", [1]], "all strings or all lists"),
        ([[1], []], "prompt 1 has no tokens"),
        ("text", "need a tokenizer: pass tokenizer="),
    ],
)
def test_generate_refuses(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected 0 or more, found -1"),
        ({"stream_steps": 0}, "stream_steps: expected 1 or more, found 0"),
        ({"stop_tokens": [2**40]}, "stop token: expected -1 to 2147483647, found 1099511627776"),
        ({"stop_tokens": -2}, "stop token: expected -1 to"),
        ({"prompts": [[3, 2**40]]}, "prompt 0: expected 0 to 2147483647, found 1099511627776"),
    ],
)
def test_generate_refuses_numbers_out_of_range(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[3]], **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 3.0}, "max_new_tokens: expected an integer, found 3.0"),
        ({"stream_steps": "8"}, "stream_steps: expected an integer, found '8'"),
        ({"prompts": [[3], [5.9]]}, "prompt 1: expected an integer, found 5.9"),
        ({"prompts": [np.array([1.0, 2.0])]}, "prompt 0: expected an integer, found .*1.0"),
        ({"stop_tokens": [[2.5]]}, "stop token: expected an integer, found 2.5"),
        ({"key": 7}, r"key: expected one PRNG key, such as jax.random.key\(7\), found 7"),
        ({"key": jnp.ones(2)}, r"key: expected one PRNG key.* found float32 of shape \(2,\)"),
        ({"key": jax.random.split(jax.random.key(0))}, "found key<.*> of shape"),
    ],
)
def test_generate_refuses_what_is_no_integer_and_no_key(model, wrong, message):
    with pytest.raises(TypeError, match=message):
        generate(model, **{"prompts": [[3]], **wrong})


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_no_tokens_have_no_logits(model, shape):
    logits = model(jnp.zeros(shape, jnp.int32))
    assert logits.shape == (*shape, model.config.vocab_size) and logits.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"prompt tokens: got shape .*; there is nothing to read"):
        prefill(model, np.zeros(shape, np.int32), KVCache.init(model.config, 1, SLOTS))


def test_tokens_of_another_shape_or_kind_are_refused(model):
    with pytest.raises(ValueError, match=r"tokens: expected integers \[B, L\], found int32 "):
        model(jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match="tokens: expected integers .* found float32"):
        model(jnp.zeros((1, 3)))


def test_generate_refuses_more_than_max_length(model):
    with pytest.raises(ValueError, match="do not fit in max_length=8"):
        generate(model, [[3] * 5], 4, max_length=8)


class Bytes:
    """A tokenizer whose tokens are bytes modulo 96, to test what is streamed."""

    stop_token_ids = ()

    def encode(self, text, *, bos=False):
        return [b % 93 + 3 for b in text.encode()]

    def decode(self, tokens):
        return "".join(chr(64 + t) for t in tokens)

    def stream(self):
        decode_ = self.decode

        class Stream:
            held = None

            def feed(self, tokens):
                # Holds back the last token, as a decoder of partial characters may.
                tokens = ([] if self.held is None else [self.held]) + list(tokens)
                self.held = tokens.pop()
                return decode_(tokens)

            def finish(self):
                return "" if self.held is None else decode_([self.held])

        return Stream()


def test_generate_text_streams_all_of_it(model):
    pieces = {0: "", 1: ""}

    def stream(index, piece):
        pieces[index] += piece

    prompts = ["hello", "hi"]
    out = generate(
        model, prompts, 6, stop_tokens=(), tokenizer=Bytes(), stream=stream, stream_steps=3
    )
    assert [len(text) for text in out] == [6, 6]
    assert out == list(pieces.values())
