"""Kernels whose contracted axes are not the last but one: saved, loaded and converted."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import typer.testing
from flax import nnx

import fdq
from fdq.cli import app
from fdq.formats.folded import FoldedWeight
from fdq_checkpoints import CheckpointError
from fdq_checkpoints.store import manifest

RULES = {
    "*.weight": ("W4A16-g32", {"contract": 1}),
    "*.query": ("W8A16", {"contract": 0}),
    "*": "W8A16",
}


def params(rng):
    return {
        "torch": {"weight": rng.standard_normal((24, 64)).astype(np.float32)},
        "attention": {"query": {"kernel": rng.standard_normal((64, 4, 8)).astype(np.float32)}},
        "out": {"kernel": rng.standard_normal((64, 8)).astype(np.float32)},
    }


def assert_same(found, expected):
    for path in (("torch", "weight"), ("attention", "query", "kernel")):
        one, other = found, expected
        for key in path:
            one, other = one[key], other[key]
        assert isinstance(one, FoldedWeight) and (one.fold, one.sizes) == (other.fold, other.sizes)
        np.testing.assert_array_equal(one.dequantize(), other.dequantize())
    np.testing.assert_array_equal(
        *map(fdq.dequantize, (found["out"]["kernel"], expected["out"]["kernel"]))
    )


def test_it_is_saved_and_loaded_as_it_is(rng, tmp_path):
    tree = fdq.quantize(params(rng), RULES)
    fdq.save(tree, tmp_path / "a")
    assert_same(fdq.load(tmp_path / "a"), tree)
    assert_same(fdq.load(tmp_path / "a", template=tree), tree)
    other = fdq.quantize(params(rng), RULES | {"*.query": ("W8A16", {"contract": (0, 1)})})
    with pytest.raises(CheckpointError, match=r"query\.kernel: stored with other contracted axes"):
        fdq.load(tmp_path / "a", template=other)


def test_a_module_holds_one(rng, tmp_path):
    class Layer(nnx.Module):
        def __init__(self, weight):
            self.weight = nnx.data(weight)
            self.bias = nnx.Param(jnp.zeros(24))

    weight = fdq.quantize(params(rng), RULES)["torch"]["weight"]
    fdq.save(Layer(weight), tmp_path / "a")
    back = fdq.load(tmp_path / "a", template=Layer(weight))
    np.testing.assert_array_equal(back.weight.dequantize(), weight.dequantize())


def test_rules_with_contracted_axes_convert_as_they_quantize(rng, tmp_path):
    tree = params(rng)
    fdq.save(tree, tmp_path / "floats")
    expected = fdq.quantize(tree, RULES)
    fdq.convert(tmp_path / "floats", tmp_path / "a", RULES)
    assert_same(fdq.load(tmp_path / "a"), expected)
    assert_same(fdq.load(tmp_path / "floats", RULES), expected)
    scheme = json.dumps(RULES)
    command = ["convert", str(tmp_path / "floats"), str(tmp_path / "b"), "--scheme", scheme]
    result = typer.testing.CliRunner().invoke(app.app, command)
    assert result.exit_code == 0, result.output
    assert_same(fdq.load(tmp_path / "b"), expected)


@pytest.mark.parametrize("order", [[0, 0], [0, 2], [1], [1, 0, 2]])
def test_a_fold_that_is_none_is_refused(order, rng, tmp_path):
    weight = fdq.quantize(params(rng), RULES)["torch"]["weight"]
    q = weight.q
    arrays = {n: manifest.ArrayEntry(a.dtype.name, a.shape, 0) for n, a in q.arrays().items()}
    entry = manifest.TensorEntry(("w",), weight.shape, arrays, q.spec, q.padding, fold=weight.fold)
    stored = json.loads(json.dumps(manifest.tensor_to_json(entry)))
    assert manifest.tensor_from_json(stored, "here") == entry
    stored["fold"]["order"] = order
    with pytest.raises(CheckpointError, match="here: w: .*is no fold of shape"):
        manifest.tensor_from_json(stored, "here")
