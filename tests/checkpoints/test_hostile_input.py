"""Broken and hostile directories: each is refused with one line that says what is wrong."""

import json
import os
import pathlib

import numpy as np
import pytest

from fdq.models import config_reader
from fdq_checkpoints import CheckpointError, load
from fdq_checkpoints.readers.safetensors_reader import SafetensorsFile
from tests.checkpoints import builders

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = bytes(8)


def entry(**changes):
    return {"a": F32 | changes}


# Name, the bytes of the file, a fragment of the message.
FILES = [
    ("empty", b"", "too short"),
    ("seven bytes", b"1234567", "too short"),
    ("header length zero", builders.file_bytes(b"", b""), "header length 0"),
    ("header beyond the file", b"\xff\xff\0\0\0\0\0\0{}", "truncated: the header needs"),
    ("absurd header length", b"\xff" * 8 + b"{}", "header length 18446744073709551615"),
    ("header not an object", builders.file_bytes(b"[1]", b""), "does not begin with '{'"),
    ("header not UTF-8", builders.file_bytes(b'{"\xff": 1}', b""), "not UTF-8"),
    ("header not JSON", builders.file_bytes(b'{"a": }', b""), "not valid JSON"),
    ("too deep", builders.file_bytes(b'{"a":' + b"[" * 100_000, b""), "nested deeper than 64"),
    (
        "the same name twice",
        builders.file_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(F32).encode(),) * 2), EIGHT),
        "'a' appears twice",
    ),
    ("unknown field", builders.file_bytes(entry(extra=1), EIGHT), "exactly dtype, shape"),
    ("missing field", builders.file_bytes({"a": {"dtype": "F32"}}, EIGHT), "exactly dtype, shape"),
    ("unknown dtype", builders.file_bytes(entry(dtype="F4"), EIGHT), "unsupported dtype 'F4'"),
    ("dtype not a name", builders.file_bytes(entry(dtype=[1]), EIGHT), "unsupported dtype"),
    ("negative size", builders.file_bytes(entry(shape=[-2]), EIGHT), "not a list of sizes"),
    ("size true", builders.file_bytes(entry(shape=[True, 2]), EIGHT), "not a list of sizes"),
    ("size 2.0", builders.file_bytes(entry(shape=[2.0]), EIGHT), "not a list of sizes"),
    ("zero times huge", builders.file_bytes(entry(shape=[0, 2**60]), b""), "not a list of sizes"),
    ("rank nine", builders.file_bytes(entry(shape=[1] * 8 + [2]), EIGHT), "9 dimensions"),
    ("shape without bytes", builders.file_bytes(entry(shape=[3]), EIGHT), "needs 12 bytes"),
    ("overflow", builders.file_bytes(entry(shape=[2**40] * 3), EIGHT), "data_offsets give 8"),
    ("reversed", builders.file_bytes(entry(data_offsets=[8, 0]), EIGHT), "not [begin, end]"),
    ("negative offset", builders.file_bytes(entry(data_offsets=[-8, 0]), EIGHT), "not [begin"),
    ("offset 0.0", builders.file_bytes(entry(data_offsets=[0.0, 8]), EIGHT), "not [begin, end]"),
    (
        "overlap",
        builders.file_bytes({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
        "'b': its bytes overlap",
    ),
    ("hole", builders.file_bytes(entry(data_offsets=[8, 16]), bytes(16)), "a hole of 8 bytes"),
    ("trailing bytes", builders.file_bytes({"a": F32}, bytes(9)), "1 trailing bytes"),
    ("truncated data", builders.file_bytes({"a": F32}, bytes(7)), "truncated: ends at byte"),
    ("path as name", builders.file_bytes({"../etc/passwd": F32}, EIGHT), "illegal name"),
    ("control character", builders.file_bytes({"a\x1b[2J": F32}, EIGHT), "illegal name"),
    ("long name", builders.file_bytes({"a" * 513: F32}, EIGHT), "illegal name"),
    ("metadata", builders.file_bytes({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    (
        "many tensors",
        builders.file_bytes(
            b"{"
            + b",".join(
                b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(70_000)
            )
            + b"}",
            b"",
        ),
        "a header of more than 65536 tensors",
    ),
    ("LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("zip", b"PK\x03\x04" + bytes(60), "zip archive"),
    ("pickle", b"\x80\x02}q\x00." + bytes(60), "pickle"),
    ("gguf", b"GGUF" + bytes(60), "GGUF"),
]


@pytest.mark.parametrize(("data", "message"), [c[1:] for c in FILES], ids=[c[0] for c in FILES])
def test_file_is_refused(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert message in text and str(path) in text
    assert "\n" not in text and "\x1b" not in text


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_not_a_file(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    os.mkdir(path) if kind == "directory" else os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(path)


def _one(folder: pathlib.Path, tensors, name, array):
    builders.write(folder / "model.safetensors", tensors | {name: array})


NORM = "model.norm.weight"


def no_config(folder, tensors):
    (folder / "config.json").unlink()


def config_list(folder, tensors):
    (folder / "config.json").write_text("[]")


def config_twice(folder, tensors):
    (folder / "config.json").write_text('{"model_type": "llama", "model_type": "qwen2"}')


def config_nan(folder, tensors):
    (folder / "config.json").write_text('{"rms_norm_eps": NaN}')


def config_huge(folder, tensors):
    (folder / "config.json").write_text('{"a": "' + "x" * 1_000_001 + '"}')


def config_layers(folder, tensors):
    builders.edit_config(folder, num_hidden_layers=10**9)


def config_many_layers(folder, tensors):
    builders.edit_config(folder, num_hidden_layers=1000)


def config_long_key(folder, tensors):
    builders.edit_config(folder, mystery=list(range(10_000)))


def quantized_long(folder, tensors):
    builders.edit_config(folder, quantization_config={"quant_method": "q" * 10_000})


def link_to_itself(folder, tensors):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def config_layers_text(folder, tensors):
    builders.edit_config(folder, num_hidden_layers="two")


def config_rope_list(folder, tensors):
    builders.edit_config(folder, rope_parameters=[1])


def config_no_heads(folder, tensors):
    builders.edit_config(folder, num_attention_heads=0)


def config_width_zero(folder, tensors):
    builders.edit_config(folder, model_type="qwen2", hidden_size=3, head_dim=...)


def unknown_family(folder, tensors):
    builders.edit_config(folder, model_type="never-heard-of")


def quantized_config(folder, tensors):
    builders.edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def quantized_modelopt(folder, tensors):
    (folder / "hf_quant_config.json").write_text("{}")


def only_pickle(folder, tensors):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder, tensors):
    (folder / "model.safetensors").unlink()


def per_rank(folder, tensors):
    (folder / "model.safetensors").unlink()
    (folder / "rank0").mkdir()


def two_files(folder, tensors):
    builders.write(folder / "model.fp16.safetensors", tensors)


def lone_shard(folder, tensors):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def index_outside(folder, tensors):
    weight_map = builders.shard(folder, tensors)
    builders.write_index(folder, weight_map | {NORM: "../model.safetensors"})


def index_absolute(folder, tensors):
    weight_map = builders.shard(folder, tensors)
    builders.write_index(folder, weight_map | {NORM: "/etc/x.safetensors"})


def index_not_text(folder, tensors):
    weight_map = builders.shard(folder, tensors)
    builders.write_index(folder, weight_map | {NORM: 7})


def index_empty(folder, tensors):
    builders.shard(folder, tensors)
    builders.write_index(folder, {})


def index_missing_shard(folder, tensors):
    builders.shard(folder, tensors)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_shard_count(folder, tensors):
    weight_map = builders.shard(folder, tensors)
    kept = {k: v for k, v in weight_map.items() if v.startswith("model-00001")}
    builders.write_index(folder, kept)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_absent_tensor(folder, tensors):
    weight_map = builders.shard(folder, tensors)
    builders.write_index(folder, weight_map | {"ghost": weight_map[NORM]})


def index_unlisted(folder, tensors):
    weight_map = builders.shard(folder, tensors)
    weight_map.pop(NORM)
    builders.write_index(folder, weight_map)


def index_twice(folder, tensors):
    weight_map = builders.shard(folder, tensors)
    first, second = sorted(set(weight_map.values()))
    in_second = {k: tensors[k] for k, v in weight_map.items() if v == second}
    name = next(k for k, v in weight_map.items() if v == first)
    builders.write(folder / second, in_second | {name: tensors[name]})


def index_and_single(folder, tensors):
    builders.shard(folder, tensors)
    builders.write(folder / "model.safetensors", tensors)


def link_outside(folder, tensors):
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


def link_broken(folder, tensors):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone.safetensors")


def missing_tensor(folder, tensors):
    builders.write(
        folder / "model.safetensors",
        {
            k.replace("norm.weight", "norm.wieght") if k == NORM else k: v
            for k, v in tensors.items()
        },
    )


def unexpected_tensor(folder, tensors):
    _one(folder, tensors, "model.layers.9.mlp.up_proj.weight", np.zeros((2, 2), np.float32))


def wrong_shape(folder, tensors):
    _one(folder, tensors, NORM, np.zeros((63,), np.float32))


def swapped_heads(folder, tensors):
    q, k = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    builders.write(folder / "model.safetensors", tensors | {q: tensors[k], k: tensors[q]})


def integer_weight(folder, tensors):
    _one(folder, tensors, NORM, np.zeros((64,), np.int8))


def float8_weight(folder, tensors):
    array = tensors["lm_head.weight"].astype("float8_e4m3fn")
    _one(folder, tensors, "lm_head.weight", array)


def nan_norm(folder, tensors):
    _one(folder, tensors, NORM, np.full((64,), np.nan, np.float32))


def nan_weight(folder, tensors):
    array = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    array[3, 4] = np.inf
    _one(folder, tensors, "model.layers.1.mlp.up_proj.weight", array)


def tied_but_different(folder, tensors):
    builders.edit_config(folder, tie_word_embeddings=True)


DIRECTORIES = [
    (no_config, "no config.json"),
    (config_list, "expected a JSON object"),
    (config_twice, "'model_type' appears twice"),
    (config_nan, "NaN is not a JSON number"),
    (config_huge, "more than the 1000000"),
    (config_layers, "num_hidden_layers = 1000000000"),
    (config_many_layers, "a model of 1000 layers, but there are 21 tensors"),
    (config_long_key, "keys that fdq does not know: {'mystery': [0, 1"),
    (quantized_long, "quantization_config ('qqqq"),
    (link_to_itself, "a link that leads nowhere"),
    (config_layers_text, "num_hidden_layers = 'two'"),
    (config_rope_list, "rope_parameters must be an object"),
    (config_no_heads, "num_attention_heads = 0 is not a whole number in 1…65536"),
    (config_width_zero, "config.json: "),
    (unknown_family, "'never-heard-of' is not supported; supported are ernie4_5"),
    (quantized_config, "quantization_config (gptq)"),
    (quantized_modelopt, "quantized already"),
    (only_pickle, "only pickled weights (pytorch_model.bin)"),
    (no_weights, "no .safetensors file"),
    (per_rank, "split per rank"),
    (two_files, "2 safetensors files but no"),
    (lone_shard, "shard 00001 of 00002"),
    (index_outside, "'../model.safetensors', which is not the name"),
    (index_absolute, "'/etc/x.safetensors', which is not the name"),
    (index_not_text, "'7', which is not the name"),
    (index_empty, "weight_map is missing"),
    (index_missing_shard, "the shard model-00002-of-00002.safetensors"),
    (index_shard_count, "names 1 shards"),
    (index_absent_tensor, "'ghost', which"),
    (index_unlisted, "'model.norm.weight' is not listed"),
    (index_twice, "is also in"),
    (index_and_single, "which does not name it"),
    (link_outside, "outside of the checkpoint"),
    (link_broken, "a link to a file that does not exist"),
    (missing_tensor, "'model.norm.weight' is missing, which norm.scale needs. The nearest"),
    (unexpected_tensor, "'model.layers.9.mlp.up_proj.weight' is not part of a llama model"),
    (wrong_shape, "has shape (63,), expected (64,)"),
    (swapped_heads, "q_proj.weight' has shape (32, 64), expected (64, 64)"),
    (integer_weight, "is int8, expected floats of 16 bits or more"),
    (float8_weight, "is float8_e4m3fn, expected floats of 16 bits or more"),
    (nan_norm, "tensor 'model.norm.weight' holds nan at [0] (norm.scale). Expected finite"),
    (nan_weight, "holds inf at [3, 4] (layers.1.mlp.gate_up_proj.kernel)"),
    (tied_but_different, "'lm_head.weight' differs from 'model.embed_tokens.weight'"),
]


@pytest.mark.parametrize(
    ("damage", "message"), DIRECTORIES, ids=[case[0].__name__ for case in DIRECTORIES]
)
def test_directory_is_refused(tmp_path, damage, message):
    folder = tmp_path / "model"
    tensors = builders.model("llama", folder)
    damage(folder, tensors)
    with pytest.raises(ValueError) as caught:
        load(folder, "W8A16" if damage is nan_weight else None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="on the Hugging Face hub is hf://"):
        load(tmp_path / "org" / "model")


def test_links_of_the_hub_cache_are_followed(tmp_path):
    cache = tmp_path / "models--org--tiny"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    builders.model("llama", snapshot)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).rename(cache / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert load(snapshot).config.vocab_size == 112


def test_a_model_deeper_than_any_is_refused_before_it_is_made(tmp_path, monkeypatch):
    builders.model("llama", tmp_path / "model")
    monkeypatch.setattr(config_reader, "MOST_LAYERS", 1)
    with pytest.raises(CheckpointError, match="num_hidden_layers must be at most 1, got 2"):
        load(tmp_path / "model")
