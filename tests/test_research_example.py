"""examples/research_decode.py: what its functions find is what they say, and they are short."""

import dataclasses
import importlib.util
import inspect
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import fdq
import fdq.models
from fdq.decoding.functional import functional
from fdq.decoding.tokenizer import Tokenizer
from tests.covering import slow
from tests.models import oracles

PATH = pathlib.Path(__file__).parent.parent / "examples" / "research_decode.py"
STEPS = 6


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("research_decode", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("qwen3")[0]


@pytest.fixture(scope="module")
def batch():
    prompts, _, tokens, *_ = oracles.greedy_batch(oracles.oracle("qwen3")[1])
    return prompts[:2, :8], [row[:STEPS] for row in tokens[:2]]


@jax.jit
def forward(model, tokens):
    return jax.nn.log_softmax(model(tokens))


def log_probabilities(model, tokens):
    """Of each next token; one shape for all tests, so that one program serves them."""
    tokens = np.asarray(tokens)
    padded = np.zeros((12, 14), np.int32)
    padded[: tokens.shape[0], : tokens.shape[1]] = tokens
    return np.asarray(forward(model, padded), np.float64)[: tokens.shape[0], : tokens.shape[1]]


def test_beam_search_finds_the_likeliest(example, model, batch):
    prompt = batch[0][0]
    beams, scores = example.beam_search(functional(model), prompt, beams=12, steps=2)
    whole = np.concatenate([np.tile(prompt, (12, 1)), beams], axis=1)
    each = np.take_along_axis(log_probabilities(model, whole)[:, 7:-1], whole[:, 8:, None], -1)
    np.testing.assert_allclose(scores, each.sum((1, 2)), atol=1e-3)
    assert (np.diff(scores) <= 0).all() and len({tuple(row) for row in beams.tolist()}) == 12
    # Of all pairs of tokens that begin with one of the twelve likeliest.
    first = log_probabilities(model, prompt[None])[0, -1]
    likely = np.argsort(-first)[:12]
    second = log_probabilities(model, [[*prompt, token] for token in likely])[:, -1]
    pairs = first[likely, None] + second
    rows, columns = np.unravel_index(np.argsort(-pairs, axis=None)[:12], pairs.shape)
    expected = list(zip(likely[rows].tolist(), columns.tolist(), strict=True))
    assert [tuple(row) for row in beams.tolist()] == expected


@pytest.mark.parametrize("scheme", [slow("W3A16-g32"), slow(None)])
def test_speculation_is_the_large_models_own_greedy_text(example, model, batch, scheme):
    """With a draft that is sometimes right, and with the model's own, which always is."""
    prompts, greedy = batch
    target = functional(model)
    drafter = functional(fdq.quantize(model, scheme)) if scheme else target
    begin = jax.jit(lambda fns: fns.init(fns.params, prompts, 40))
    state, drafted, counts = begin(target), begin(drafter), []
    while state.length.min() < 8 + STEPS:
        state, drafted, accepted = example.speculate(
            target, drafter, state, drafted, draft_length=3
        )
        counts.append(accepted)
    assert [row[:STEPS] for row in state.generated()] == greedy
    assert (drafted.tokens[:, : 8 + STEPS] == state.tokens[:, : 8 + STEPS]).all()
    assert (np.min(counts) == 3) == (scheme is None) and np.max(counts) == 3


def test_a_constraint_of_the_whole_sequence(example, model, batch):
    prompts, _ = batch
    out = fdq.generate(
        model, prompts.tolist(), 12, stop_tokens=(), logits_processor=example.no_token_twice
    )
    for prompt, new in zip(prompts, out, strict=True):
        assert len(set(new)) == 12 and not set(new) & set(prompt.tolist())


def test_scores_are_those_of_the_model(example, model, batch):
    prompts, greedy = batch
    found = example.score(functional(model), prompts, np.int32(greedy))
    whole = np.concatenate([prompts, greedy], axis=1)
    each = np.take_along_axis(log_probabilities(model, whole)[:, 7:-1], whole[:, 8:, None], -1)
    np.testing.assert_allclose(found, each.sum((1, 2)), atol=1e-3)


@pytest.mark.parametrize("name", ["beam_search", "speculate", "no_token_twice", "score"])
def test_each_is_short(example, name):
    function = inspect.unwrap(getattr(example, name))
    assert len(inspect.getsource(function).splitlines()) <= 30


@pytest.mark.slow
def test_all_of_it_runs(example, capsys):
    """With a small model of random weights, and the tokenizer of the one that ships with fdq."""
    config = dataclasses.replace(
        oracles.oracle_config("qwen3"),
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_layers=1,
    )
    model = fdq.models.Decoder(config, rngs=nnx.Rngs(params=0))
    example.main(model, Tokenizer.load(PATH.parent / "tiny_ernie"), steps=8)
    text = capsys.readouterr().out
    assert "beam search" in text and "accepted" in text and "no token twice" in text
