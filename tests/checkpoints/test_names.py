"""Hugging Face and Paddle names: every tensor lands where it belongs, transposed and joined."""

import json

import ml_dtypes
import numpy as np
import pytest

from fdq_checkpoints import convert, load, tree_paths
from fdq_checkpoints.readers.safetensors_reader import SafetensorsFile
from tests.checkpoints import builders
from tests.models import oracles

OWN_NAMES = ("gemma2", "gemma3", "glm", "glm4", "gpt_oss")
FAMILIES = sorted({path.name for path in builders.MODELS.iterdir()} - set(OWN_NAMES))


def leaves(model) -> dict[str, np.ndarray]:
    return {
        tree_paths.dotted(tensor.path): np.asarray(tensor.value)
        for tensor in tree_paths.flatten(model)
    }


def joined(tensors, *names):
    return np.concatenate([tensors[f"{name}.weight"].T for name in names], axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_lands_in_its_place(family):
    source = builders.tensors_of(builders.MODELS / family / "model.safetensors")
    config = json.loads((builders.MODELS / family / "config.json").read_text())
    model = load(builders.MODELS / family)
    found = leaves(model)
    assert sum(a.size for a in found.values()) == sum(a.size for a in source.values())
    np.testing.assert_array_equal(
        found["embed_tokens.embedding"], source["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(found["norm.scale"], source["model.norm.weight"])
    assert ("lm_head.kernel" in found) != config["tie_word_embeddings"]
    for i in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        attention = old + "self_attn."
        if attention + "kv_b_proj.weight" in source:
            names = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
            parts = [(name, (name,)) for name in names if f"{attention}{name}.weight" in source]
            assert len(parts) in (3, 4)
        else:
            parts = [("qkv_proj", ("q_proj", "k_proj", "v_proj"))]
        for path, theirs in parts:
            np.testing.assert_array_equal(
                found[f"{new}self_attn.{path}.kernel"],
                joined(source, *(attention + name for name in theirs)),
            )
        np.testing.assert_array_equal(
            found[new + "self_attn.o_proj.kernel"], joined(source, attention + "o_proj")
        )
        if f"{old}mlp.gate.weight" not in source:
            np.testing.assert_array_equal(
                found[new + "mlp.gate_up_proj.kernel"],
                joined(source, old + "mlp.gate_proj", old + "mlp.up_proj"),
            )
            continue
        np.testing.assert_array_equal(
            found[new + "mlp.router.kernel"].T, source[old + "mlp.gate.weight"]
        )
        for e, kernel in enumerate(found[new + "mlp.experts.gate_up_proj.kernel"]):
            expert = f"{old}mlp.experts.{e}."
            np.testing.assert_array_equal(
                kernel, joined(source, expert + "gate_proj", expert + "up_proj")
            )
        for e, kernel in enumerate(found[new + "mlp.experts.down_proj.kernel"]):
            np.testing.assert_array_equal(kernel, joined(source, f"{old}mlp.experts.{e}.down_proj"))


@pytest.mark.parametrize("family", OWN_NAMES)
def test_what_families_store_in_their_own_way_lands_there_too(family):
    """Norms less 1, stacks of experts with gate and up in turns: as oracles are filled by hand."""
    found, wanted = leaves(load(builders.MODELS / family)), leaves(oracles.oracle(family)[0])
    assert found.keys() == wanted.keys()
    for path, array in found.items():
        assert array.dtype == wanted[path].dtype
        np.testing.assert_array_equal(array, wanted[path])


def paddle_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same ERNIE weights under Paddle's names: [in, out], q|k|v and gate|up fused."""
    result = {}
    for name, array in tensors.items():
        new = name.replace("model.", "ernie.", 1)
        if name.endswith((".k_proj.weight", ".v_proj.weight", ".up_proj.weight")):
            continue
        if name.endswith(".q_proj.weight"):
            parts = [tensors[name.replace(".q_proj.", f".{x}_proj.")].T for x in "qkv"]
            result[new.replace(".q_proj.", ".qkv_proj.")] = np.concatenate(parts, 1)
        elif name.endswith(".gate_proj.weight"):
            parts = [tensors[name.replace(".gate_proj.", f".{x}_proj.")].T for x in ("gate", "up")]
            result[new.replace(".gate_proj.", ".up_gate_proj.")] = np.concatenate(parts, 1)
        elif name.endswith(("_proj.weight", "lm_head.weight", "mlp.gate.weight")):
            result[new] = np.ascontiguousarray(array.T)
        else:
            result[new] = array
    return result


@pytest.mark.parametrize("family", ["ernie4_5", "ernie4_5_moe", "ernie4_5_moe_untied"])
def test_paddle_names_give_the_same_model(tmp_path, family):
    tensors = builders.model(family, tmp_path / "paddle")
    builders.write(tmp_path / "paddle" / "model.safetensors", paddle_tensors(tensors))
    expected, found = leaves(load(builders.MODELS / family)), leaves(load(tmp_path / "paddle"))
    assert expected.keys() == found.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_shards_give_the_same_model(tmp_path):
    tensors = builders.model("qwen3", tmp_path / "model")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        "model.mtp_block.0.norm.weight": np.zeros(4, np.float32),
    }
    builders.shard(tmp_path / "model", tensors | extra, shards=3)
    expected, found = leaves(load(builders.MODELS / "qwen3")), leaves(load(tmp_path / "model"))
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_a_tied_head_that_is_present_and_equal_is_accepted(tmp_path):
    tensors = builders.model("qwen3", tmp_path / "model")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    builders.write(tmp_path / "model" / "model.safetensors", tensors | head)
    assert load(tmp_path / "model").lm_head is None


def test_dtype_of_what_is_not_quantized(tmp_path):
    model = load(builders.MODELS / "qwen3_moe", dtype="bfloat16")
    found = leaves(model)
    router = found.pop("layers.0.mlp.router.kernel")
    assert router.dtype == np.float32
    others = {path: a.dtype for path, a in found.items() if ".router." not in path}
    assert set(others.values()) == {np.dtype(ml_dtypes.bfloat16)}
    assert model.config.dtype == "bfloat16"


def test_reader_reads_every_dtype_and_any_rows(tmp_path, rng):
    tensors = {
        name: rng.normal(size=(5, 3)).astype(dtype) for dtype, name in builders.NAMES.items()
    }
    tensors |= {"scalar": np.float32(7).reshape(()), "empty": np.zeros((0, 4), np.float32)}
    builders.write(tmp_path / "a.safetensors", tensors)
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert list(file.tensors) == list(tensors)
        for name, array in tensors.items():
            found = file.read(name)
            assert found.dtype == array.dtype and found.shape == array.shape
            assert found.tobytes() == array.tobytes()
        assert file.read_rows("F32", 1, 3).tobytes() == tensors["F32"][1:3].tobytes()
        assert file.read_rows("BF16", 5, 5).shape == (0, 3)
        with pytest.raises(ValueError, match=r"no rows \[4, 6\)"):
            file.read_rows("F32", 4, 6)


def test_reader_agrees_with_the_safetensors_package(tmp_path, rng):
    numpy_io = pytest.importorskip("safetensors.numpy")
    tensors = {"a": rng.normal(size=(4, 6)).astype(np.float32), "b": np.arange(3)}
    numpy_io.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        for name, array in tensors.items():
            np.testing.assert_array_equal(file.read(name), array)


def test_dtypes_that_models_do_not_compute_in(tmp_path):
    for wrong in ("float12", "int8"):
        with pytest.raises(ValueError, match=rf"dtype \(='{wrong}'\) must be one of float32"):
            load(tmp_path, dtype=wrong)
        with pytest.raises(ValueError, match="must be one of float32"):
            convert(tmp_path, tmp_path / "out", "W8A16", dtype=wrong)
