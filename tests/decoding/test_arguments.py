"""What people call decoding with and cannot: the errors say what it takes."""

import types
import warnings

import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.cache import limits
from fdq.models import CONFIGS, FAMILIES, abstract
from tests.models import oracles


class Mine(nnx.Module):
    """A model of logits, as anyone's."""

    def __init__(self):
        self.table = nnx.Embed(32, 32, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
        return self.table.attend(self.table(tokens))


CALLS = {
    "generate": lambda model: fdq.generate(model, [[1, 2]], 4),
    "functional": fdq.functional,
    "prefill": lambda model: fdq.prefill(model, [[1, 2]], None),
    "decode": lambda model: fdq.decode(model, None, 4),
}
FOREIGN = {
    "a module": Mine,
    "a quantized module": lambda: fdq.quantize(Mine(), {"table": None, "*": None}),
    "Linen params": lambda: {"params": {"kernel": np.zeros((4, 4))}},
    "a path": lambda: "ernie-w4a16c8",
    "half a decoder": lambda: types.SimpleNamespace(config=None, head=None),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_model_hears_what_decoding_supports(call, kind):
    model = FOREIGN[kind]()
    with pytest.raises(TypeError, match=rf"^{call}: a {type(model).__name__} cannot") as error:
        CALLS[call](model)
    message = str(error.value)
    assert "fdq.models.Decoder" in message
    assert "fdq.load" in message
    assert all(family in message for family in FAMILIES)
    assert "extend" in message


def test_an_abstract_decoder_is_no_foreign_model():
    config = CONFIGS["llama-3-8b"].replace(num_layers=1)
    fdq.functional(abstract(config))


@pytest.fixture(scope="module")
def model():
    return oracles.oracle("qwen3")[0]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"temperature": 0.7}, "sampling=fdq.Sampling(temperature=0.7)"),
        ({"top_p": 0.9}, "sampling=fdq.Sampling(top_p=0.9)"),
        ({"top_k": 5}, "sampling=fdq.Sampling(top_k=5)"),
        ({"do_sample": True}, "sampling=fdq.Sampling()"),
        ({"max_tokens": 5}, "did you mean max_new_tokens=?"),
        ({"seed": 0}, "did you mean key=?"),
        ({"eos_token_id": 2}, "did you mean stop_tokens=?"),
        ({"stop_token": 2}, "did you mean stop_tokens=?"),
        ({"frobnicate": 1}, "it takes model, prompts, max_new_tokens, sampling"),
    ],
)
def test_an_argument_that_there_is_not_hears_what_is_meant(model, given, meant):
    (name,) = given
    with pytest.raises(TypeError) as error:
        fdq.generate(model, [[1, 2]], **given)
    assert str(error.value).startswith(f"generate has no argument {name}=; ")
    assert meant in str(error.value)


def test_decode_too_says_where_a_temperature_belongs(model):
    with pytest.raises(TypeError, match=r"decode has no argument temperature=.*fdq\.Sampling"):
        fdq.decode(model, None, 4, temperature=0.7)
    with pytest.raises(TypeError, match=r"did you mean steps=\?"):
        fdq.decode(model, None, 4, num_steps=3)


@pytest.fixture
def short(model):
    """The model, as if it had been made for 16 positions."""
    config = model.config
    model.config = config.replace(max_position=16)
    yield model
    model.config = config


@pytest.mark.parametrize(
    ("settings", "tokens"), [({"max_new_tokens": 15}, 17), ({"max_length": 40}, 40)]
)
def test_more_tokens_than_positions_warn_once(short, settings, tokens):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fdq.generate(short, [[1, 2]], **({"max_new_tokens": 1} | settings), stop_tokens=())
    (warning,) = [str(one.message) for one in found]
    assert warning.startswith(f"generate: {tokens} tokens are more than the 16 positions")


def test_as_many_tokens_as_positions_do_not_warn_and_the_cache_is_no_longer(short, monkeypatch):
    lengths = []
    init = type(short).init_cache

    def recorded(self, batch, max_length, format):
        lengths.append(max_length)
        return init(self, batch, max_length, format)

    monkeypatch.setattr(type(short), "init_cache", recorded)
    fdq.generate(short, [[1, 2]], 1, stop_tokens=())
    assert lengths == [16]


def test_ten_million_tokens_are_refused_before_anything_is_made(short, monkeypatch):
    monkeypatch.setattr(limits, "available_bytes", lambda device=None: 10**9)
    with (
        pytest.warns(UserWarning, match="10,000,002 tokens are more than the 16 positions"),
        pytest.raises(ValueError, match=r"tokens would fit: take fewer \(max_new_tokens"),
    ):
        fdq.generate(short, [[1, 2]], max_new_tokens=10**7)
