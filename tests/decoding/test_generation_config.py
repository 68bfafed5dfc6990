"""generation_config.json: what is taken from it, what is left out, and what it must not say."""

import json

import jax
import numpy as np
import pytest

from fdq.cache.kv_cache import KVCache
from fdq.decoding.generation_config import GenerationConfig
from fdq.decoding.repetition import repetition_penalty
from fdq.decoding.state import DecodeState
from fdq.models import CONFIGS


def load(folder, **content):
    (folder / "generation_config.json").write_text(json.dumps(content))
    return GenerationConfig.load(folder)


def test_without_the_file_nothing_is_said(tmp_path):
    found = GenerationConfig.load(tmp_path)
    assert found == GenerationConfig()
    assert found.sampling is None
    assert found.logits_processor is None
    assert found.to_dict() == {"do_sample": False}


def test_what_is_taken(tmp_path):
    found = load(
        tmp_path,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.05,
        repetition_penalty=1.1,
        max_new_tokens=2048,
        eos_token_id=[151645, 151643],
        bos_token_id=1,
        transformers_version="5.23.0",
        num_beams=1,
        no_repeat_ngram_size=3,
        suppress_tokens=[1, 2],
    )
    sampling = found.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (
        0.6, 20, 0.95, 0.05,
    )  # fmt: skip
    assert found.stop_tokens == (151645, 151643)
    assert found.max_new_tokens == 2048
    assert found.logits_processor is not None
    assert found.left_out == ("no_repeat_ngram_size", "suppress_tokens")
    assert found.to_dict()["temperature"] == 0.6


def test_values_that_restrict_nothing_are_none(tmp_path):
    found = load(
        tmp_path, do_sample=True, top_k=0, top_p=1.0, min_p=0, repetition_penalty=1.0,
        eos_token_id=2, temperature=None,
    )  # fmt: skip
    assert repr(found.sampling) == "Sampling(temperature=1.0)"
    assert found.logits_processor is None
    assert load(tmp_path, do_sample=True, temperature=0.0).sampling is None


def test_without_do_sample_the_likeliest_is_taken(tmp_path):
    found = load(tmp_path, temperature=0.6, top_p=0.9)
    assert found.sampling is None
    assert found.to_dict() == {"do_sample": False}
    # Whoever asks for draws gets the file's restrictions of them.
    assert repr(found.given(temperature=0.5).sampling) == "Sampling(temperature=0.5, top_p=0.9)"


def test_arguments_win(tmp_path):
    found = load(tmp_path, do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.2)
    assert found.given() == found
    assert repr(found.given(top_k=5).sampling) == "Sampling(temperature=0.6, top_k=5)"
    assert found.given(temperature=0.0).sampling is None
    assert found.given(repetition_penalty=1.0).logits_processor is None
    with pytest.raises(ValueError, match=r"--top-k, --min-p: chooses among random draws"):
        load(tmp_path).given(top_k=3, min_p=0.1)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("do_sample", "yes", "do_sample: expected true or false, found 'yes'"),
        ("temperature", -1, "temperature: expected a number 0 or more, found -1"),
        ("temperature", "hot", "temperature: expected a number 0 or more"),
        ("temperature", float("inf"), "temperature: expected a number 0 or more"),
        ("top_k", 2.5, "top_k: expected a whole number above 0, found 2.5"),
        ("top_k", True, "top_k: expected a whole number above 0"),
        ("top_p", 1.5, "top_p: expected a number above 0 and at most 1"),
        ("min_p", -0.1, "min_p: expected a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty: expected a number above 0"),
        ("max_new_tokens", 0, "max_new_tokens: expected a whole number above 0"),
        ("eos_token_id", ["a"], "eos_token_id: expected a token number"),
    ],
)
def test_what_can_mean_nothing_is_refused(key, value, said, tmp_path):
    with pytest.raises(ValueError, match=said) as raised:
        load(tmp_path, **{key: value})
    assert "generation_config.json" in str(raised.value)


def test_the_penalty_of_repetitions(rng):
    config = CONFIGS["ernie-4.5-0.3b"].replace(num_layers=1, vocab_size=16)
    cache = KVCache.init(config, batch=2, max_length=8, format="C16")
    tokens = np.array([[3, 5, 3, 0], [7, 0, 0, 0]], np.int32)
    state = DecodeState.start(jax.numpy.asarray(tokens), np.array([3, 1]), cache)
    logits = rng.normal(size=(2, 16)).astype(np.float32)
    expected = logits.copy()
    # As transformers' RepetitionPenaltyLogitsProcessor: each token once.
    for row, seen in enumerate(({3, 5}, {7})):
        for token in seen:
            value = logits[row, token]
            expected[row, token] = value / 1.25 if value > 0 else value * 1.25
    found = repetition_penalty(1.25)(jax.numpy.asarray(logits), state)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
