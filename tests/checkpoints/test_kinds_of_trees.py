"""Trees, paths and directories of other shapes than expected: refused by name, nothing lost."""

import json
import re

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp0
import pytest
from orbax.checkpoint import v1 as ocp1

import fdq
from fdq_checkpoints import CheckpointError, inspect, load
from tests.checkpoints import builders

KERNEL = np.arange(32 * 16, dtype=np.float32).reshape(32, 16)


def test_leaves_whose_paths_read_alike_are_refused_before_one_is_lost(tmp_path):
    """Of two such arrays Orbax keeps one, without a word."""
    tree = {"a.b": {"kernel": KERNEL}, "a": {"b": {"kernel": 0 * KERNEL}}}
    with pytest.raises(CheckpointError, match=r"a\.b\.kernel: two leaves have this path"):
        fdq.save(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ocp0.PyTreeCheckpointer().save(tmp_path / "orbax", tree)
    for use in (load, inspect, lambda path: fdq.convert(path, tmp_path / "out", "W8A16")):
        with pytest.raises(CheckpointError, match=r"orbax: a\.b\.kernel: two leaves have this"):
            use(tmp_path / "orbax")
    fdq.save({"a.b": KERNEL, "a/c": KERNEL[:1]}, tmp_path / "dots")
    assert {path: x.shape for path, x in load(tmp_path / "dots").items()} == {
        "a.b": (32, 16),
        "a/c": (1, 16),
    }


@pytest.mark.parametrize(
    "wrong",
    [np.array(["text"]), np.array([None]), np.array("2026-01-01", "datetime64[D]")],
    ids=str,
)
def test_arrays_of_no_numbers_are_refused_by_their_path(tmp_path, wrong):
    with pytest.raises(CheckpointError, match=r"x\.y: expected an array of numbers, found"):
        fdq.save({"x": {"y": wrong}}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tree_of_empty_arrays_has_nothing_to_save(tmp_path):
    with pytest.raises(CheckpointError, match="dict has only empty arrays"):
        fdq.save({"a": np.zeros((0, 3))}, tmp_path / "out")
    fdq.save({"a": np.zeros((0, 3)), "b": KERNEL}, tmp_path / "out")
    assert load(tmp_path / "out")["a"].shape == (0, 3)


def test_a_part_of_a_tree_that_is_one_array(tmp_path):
    ocp0.PyTreeCheckpointer().save(tmp_path / "tree", {"params": {"kernel": KERNEL}})
    with pytest.raises(CheckpointError, match=r"params\.kernel is one array, expected a tree"):
        load(tmp_path / "tree", subtree="params.kernel")
    with pytest.raises(TypeError, match="subtree: expected a dotted path such as 'params', found"):
        load(tmp_path / "tree", subtree=3)
    ocp1.save(tmp_path / "array", jnp.asarray(KERNEL))
    with pytest.raises(CheckpointError, match="array: all of it is one array, expected a tree"):
        fdq.convert(tmp_path / "array", tmp_path / "out", "W8A16")


def test_what_of_a_scheme_has_no_place_is_said_by_every_door(tmp_path, caplog):
    tree = {"layer": {"kernel": jnp.asarray(KERNEL)}}
    fdq.save(tree, tmp_path / "tree")
    model = builders.MODELS / "llama"
    tell = {
        "A tree has no layers: activations .A8. are not quantized": (
            lambda: fdq.quantize(tree, "W8A8"),
            lambda: load(tmp_path / "tree", "W8A8"),
            lambda: fdq.convert(tmp_path / "tree", tmp_path / "out", "W8A8"),
        ),
        "No tensor here is for the rule .*: all that is quantized is W8A16": (
            lambda: fdq.quantize(load(model), "mix_quant"),
            lambda: load(model, "mix_quant"),
            lambda: fdq.convert(model, tmp_path / "model", "mix_quant"),
        ),
    }
    for message, calls in tell.items():
        for call in calls:
            caplog.clear()
            call()
            (record,) = caplog.records
            assert re.search(message, record.getMessage())


@pytest.mark.parametrize("wrong", [None, 5, b"/tmp"])
def test_a_path_is_text(wrong):
    for use in (load, inspect):
        with pytest.raises(TypeError, match="expected the path of a checkpoint's directory, found"):
            use(wrong)


def test_an_empty_path_is_not_the_current_directory(tmp_path, monkeypatch):
    builders.model("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    load(".")
    with pytest.raises(FileNotFoundError, match="an empty path"):
        load("")


def test_the_older_key_of_compressed_tensors_names_a_quantized_release(tmp_path):
    builders.model("llama", tmp_path / "model")
    groups = {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}}
    builders.edit_config(tmp_path / "model", compression_config={"config_groups": groups})
    table = inspect(tmp_path / "model")
    assert table.scheme is not None and table.scheme.startswith("compressed-tensors, 4 bits")
    with pytest.raises(CheckpointError, match=r"compression_config .*quantized already"):
        load(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["compression_config"]
