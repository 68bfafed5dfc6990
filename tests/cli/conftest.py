"""A model for the commands, and checkpoints of it."""

import json

import pytest
from flax import nnx

import fdq_checkpoints
from fdq.models import CONFIGS, Decoder
from tests.byte_tokenizer import save_byte_tokenizer
from tests.cli.command import TEXT, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def original(folder):
    """A random float model with a byte-level tokenizer, as an fdq checkpoint."""
    save_byte_tokenizer(folder / "tokenizer.json", [TEXT], 288)
    config = CONFIGS["ernie-4.5-0.3b"].replace(
        vocab_size=288,
        hidden_size=128,
        intermediate_size=128,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        dtype="float32",
    )
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    model.tokenizer_path = str(folder / "tokenizer.json")
    fdq_checkpoints.save(model, folder / "original")
    return folder / "original"


@pytest.fixture(scope="module")
def converted(original, folder):
    result = run("convert", original, folder / "w4", "--scheme", "W4A16C8", "--json")
    content = json.loads(result.stdout)
    assert content["bytes_after"] < content["bytes_before"]
    assert content["quantized_bits_per_weight"] == 4.125
    assert {row["format"] for row in content["formats"]} == {"W4", "float32"}
    return folder / "w4"


@pytest.fixture(scope="module")
def stranger(original, folder):
    """A model of the same sizes whose tokens `a` and `b` have changed places."""
    other = folder / "stranger" / "tokenizer.json"
    other.parent.mkdir()
    content = json.loads((original / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other.write_text(json.dumps(content))
    model = fdq_checkpoints.load(original)
    model.tokenizer_path = str(other)
    fdq_checkpoints.save(model, folder / "stranger" / "model")
    return folder / "stranger" / "model"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
