"""What is no checkpoint's directory: the error says what it is, and what to do."""

import logging
import os

import numpy as np
import pytest

import fdq
from fdq_checkpoints import CheckpointError, convert, inspect, load
from tests.checkpoints import builders
from tests.checkpoints.test_names import leaves
from tests.cli.command import run

HF = r"give hf://baidu/ERNIE-4\.5-0\.3B-PT"
NAMES = {
    "baidu/ERNIE-4.5-0.3B-PT": r"ERNIE-4\.5-0\.3B-PT does not exist.*" + HF,
    "https://huggingface.co/baidu/ERNIE-4.5-0.3B-PT": HF,
    "https://huggingface.co/baidu/ERNIE-4.5-0.3B-PT/tree/main": HF,
    "s3://bucket/model": "an address that fdq does not know. Download",
    "gs://bucket/model": "an address that fdq does not know. Download",
    "models/absent": "models/absent does not exist",
    "absent": "absent does not exist. Expected the directory of a checkpoint",
    "../absent/there": "absent/there does not exist. Expected",
    "~/absent": "absent does not exist. Expected",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    uses = (load, inspect, lambda x: convert(x, "out", "W8A16"), lambda x: fdq.load(x, "W4A16"))
    for use in uses:
        with pytest.raises(FileNotFoundError, match=NAMES[name]) as raised:
            use(name)
        # As it was given: pathlib makes `hf:/` of `hf://`.
        assert name in str(raised.value) or "//" not in name
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("command", ["inspect", "convert", "generate", "evaluate"])
def test_the_command_says_it_too(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    more = {"convert": ["out", "-s", "W4A16"], "generate": ["-p", "a"]}.get(command, [])
    name = "baidu/ERNIE-4.5-0.3B-PT"
    result = run(command, name, *more, code=2)
    assert "give hf://baidu/ERNIE-4.5-0.3B-PT" in result.stderr
    assert name in result.stderr
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    result = run(command, "model-Q4_K_M.gguf", *more, code=2)
    assert "truncated: 4 bytes, too short for GGUF" in result.stderr


def test_a_directory_that_is_there_is_no_name(tmp_path, monkeypatch):
    builders.model("qwen3", tmp_path / "baidu" / "model")
    monkeypatch.chdir(tmp_path)
    assert load("baidu/model").config.num_layers == 2
    with pytest.raises(FileNotFoundError, match="baidu/other does not exist. Expected the direct"):
        load("baidu/other")


FILES = {
    "model-Q4_K_M.gguf": "not GGUF: it does not begin with 'GGUF'",
    "MODEL.GGUF": "not GGUF",
    "renamed": "truncated: 4 bytes, too short for GGUF",
    "pytorch_model.bin": "pickled weights, which can run code",
    "model.safetensors": "a file of a checkpoint; give the directory that holds it",
    "fdq.json": "a file of a checkpoint; give the directory that holds it",
    "notes.txt": "notes.txt is a file. Expected the directory",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_named_for_what_it_is(tmp_path, name):
    content = b"GGUF" if name == "renamed" else b"text"
    (tmp_path / name).write_bytes(content)
    for use in (load, inspect, lambda path: convert(path, tmp_path / "out", "W8A16")):
        with pytest.raises(CheckpointError, match=FILES[name]):
            use(tmp_path / name)


def gguf(folder):
    (folder / "model-Q8_0.gguf").write_bytes(b"GGUF")
    return "model-Q8_0.gguf: truncated: 4 bytes, too short for GGUF"


def gguf_beside_a_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return gguf(folder)


def ggufs(folder):
    for name in ("a-Q8_0.gguf", "a-Q4_K_M.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return "2 models in GGUF: a-Q4_K_M.gguf, a-Q8_0.gguf. Name one of them"


def gguf_beside_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "model-Q8_0.gguf").write_bytes(b"GGUF")
    return "safetensors without a config.json, and model-Q8_0.gguf. Name the GGUF"


def peft(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return r"adapters \(PEFT\) without their model"


def cache_of_the_hub(folder):
    (folder / "blobs").mkdir()
    builders.model("qwen3", folder / "snapshots" / "0123abc")
    return "snapshots/0123abc has one. Give that directory"


def folder_above(folder):
    builders.model("qwen3", folder / "inner")
    return "no config.json, but .*/inner has one"


def nothing(folder):
    return r"no config\.json \(nor fdq\.json\)"


@pytest.mark.parametrize(
    "make",
    [
        *(gguf, gguf_beside_a_config, ggufs, gguf_beside_safetensors),
        *(peft, cache_of_the_hub, folder_above, nothing),
    ],
)
def test_a_directory_of_something_else(tmp_path, make):
    folder = tmp_path / "given"
    folder.mkdir()
    message = make(folder)
    for use in (load, inspect, lambda path: convert(path, tmp_path / "out", "W8A16")):
        with pytest.raises(CheckpointError, match=message):
            use(folder)


BESIDE = {
    "adapters": ["adapter_model.safetensors"],
    "the publisher's names": ["consolidated.safetensors"],
    "both, in parts": [
        "adapter_model.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "consolidated.safetensors.index.json",
    ],
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_the_model_is_read_and_not_what_is_beside_it(tmp_path, name, sharded, caplog):
    tensors = builders.model("qwen3", tmp_path / "model")
    if sharded:
        builders.shard(tmp_path / "model", tensors)
    for file in BESIDE[name]:
        if file.endswith(".json"):
            (tmp_path / "model" / file).write_text('{"weight_map": {"a": "b.safetensors"}}')
        else:
            builders.write(tmp_path / "model" / file, {"a": np.zeros(3, np.float32)})
    expected = leaves(load(builders.MODELS / "qwen3"))
    with caplog.at_level(logging.WARNING, "fdq"):
        found = leaves(load(tmp_path / "model"))
    assert expected.keys() == found.keys()
    np.testing.assert_array_equal(found["norm.scale"], expected["norm.scale"])
    assert ("adapter_model.safetensors is not applied" in caplog.text) == (
        "adapter_model.safetensors" in BESIDE[name]
    )


def test_parts_beside_a_whole_model_are_refused(tmp_path):
    tensors = builders.model("qwen3", tmp_path / "model")
    builders.write(tmp_path / "model" / "model-00001-of-00002.safetensors", tensors)
    with pytest.raises(CheckpointError, match="2 safetensors files but no model.safetensors.index"):
        load(tmp_path / "model")


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_tokenizer_of_sentencepiece_alone_is_named_where_text_will_need_it(
    tmp_path, name, caplog
):
    folder = tmp_path / "model"
    builders.model("qwen3", folder)
    (folder / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "fdq"):
        model = load(folder)
        fix = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        assert f"a SentencePiece {name} and no tokenizer.json" in caplog.text
        assert fix in caplog.text
        caplog.clear()
        convert(folder, tmp_path / "out", "W8A16")
        assert fix in caplog.text
    with pytest.raises(FileNotFoundError, match="SentencePiece.*save_pretrained"):
        fdq.generate(model, ["text"], 2)
    caplog.clear()
    (folder / "tokenizer.json").write_text("{}")
    load(folder)
    assert not caplog.text
