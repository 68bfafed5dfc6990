"""An importer that the library does not know, and statistics on every way to a checkpoint."""

import json
from typing import ClassVar

import jax
import numpy as np
import pytest

import fdq
from fdq.formats.qtensor import QTensor
from fdq.quantizers import quantize_array
from fdq.quantizers.quantization import quantize
from fdq.schemes.scheme import WeightSpec
from fdq_checkpoints import CheckpointError, inspect, load
from fdq_checkpoints.sources import SOURCES, Source, open_source
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same

G32 = WeightSpec.parse("W4-g32")


class Arrays(Source):
    """A toy: an .npz with one weight of floats and one of int4, as `weights.npz`."""

    def __init__(self, folder):
        self.folder = folder
        with np.load(folder / "weights.npz") as arrays:
            self.arrays = dict(arrays)
        self.packed = quantize_array(self.arrays["packed"], G32, method="absmax")
        self.tree = {
            "a": {"kernel": jax.ShapeDtypeStruct((64, 8), np.float32)},
            "b": {"kernel": jax.eval_shape(lambda: self.packed)},
        }

    def read(self, path, index=None):
        assert index is None
        return self.packed if path[0] == "b" else self.arrays["plain"]


class Importer:
    name = "toy arrays"

    def claims(self, folder):
        return (folder / "weights.npz").exists()

    def open(self, folder, *, dtype=None):
        del dtype
        return Arrays(folder)


@pytest.fixture
def toy(tmp_path, rng):
    folder = tmp_path / "toy"
    folder.mkdir()
    arrays = {name: rng.standard_normal((64, 8)).astype(np.float32) for name in ("plain", "packed")}
    np.savez(folder / "weights.npz", **arrays)
    # Looks like a Hugging Face directory that is quantized, which fdq itself refuses.
    config = {"model_type": "llama", "quantization_config": {"quant_method": "toy"}}
    (folder / "config.json").write_text(json.dumps(config))
    with SOURCES.registered(Importer()):
        yield folder, arrays


def test_an_importer_from_outside_loads_inspects_and_converts(toy, tmp_path):
    folder, arrays = toy
    packed = quantize_array(arrays["packed"], G32, method="absmax")
    as_it_is = load(folder)
    np.testing.assert_array_equal(as_it_is["a"]["kernel"], arrays["plain"])
    assert isinstance(as_it_is["b"]["kernel"], QTensor)
    assert_same(as_it_is["b"]["kernel"], packed)
    table = inspect(folder)
    assert table.kind == "toy arrays"
    assert [row.format for row in table.rows] == ["float32", "W4-g32"]
    expected = {"a": {"kernel": quantize_array(arrays["plain"], WeightSpec.parse("W8"))}}
    expected["b"] = {"kernel": packed}
    assert_same(load(folder, "W8A16"), expected)
    fdq.convert(folder, tmp_path / "out", "W8A16")
    assert_same(load(tmp_path / "out"), expected)
    with pytest.raises(CheckpointError, match="config= and subtree= are for Orbax"):
        fdq.convert(folder, tmp_path / "more", "W8A16", subtree="a")


class PartlyPacked(Source):
    """A toy: an fdq model of which one layer is in int8 already."""

    packed = ("layers", "0", "mlp", "down_proj", "kernel")
    recipe: ClassVar = {"layers.0.mlp.down_proj": "W8A16"}

    def __init__(self, folder):
        self.folder, self.floats = folder, open_source(builders.MODELS / "qwen3")
        self.config, self.tree = self.floats.config, quantize(self.floats.tree, self.recipe)

    def read(self, path, index=None):
        array = self.floats.read(path, index)
        if path != self.packed:
            return array
        return quantize_array(np.asarray(array), WeightSpec.parse("W8"))

    def close(self):
        self.floats.close()


class Models(Importer):
    name = "toy models"

    def open(self, folder, *, dtype=None):
        del dtype
        return PartlyPacked(folder)


@pytest.mark.slow
def test_what_a_model_has_in_codes_stays_and_the_rest_follows_the_recipe(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "weights.npz").touch()
    floats = load(builders.MODELS / "qwen3")
    with SOURCES.registered(Models()):
        expected = quantize(floats, PartlyPacked.recipe)
        assert_same(load(folder), expected)
        fdq.convert(folder, tmp_path / "same", None)
        assert_same(load(tmp_path / "same"), expected)
        assert load(tmp_path / "same").scheme == expected.scheme
        assert_same(load(folder, "WNF4A16-g16"), quantize(expected, "WNF4A16-g16"))


def test_what_no_importer_claims_is_refused_as_ever(tmp_path):
    builders.model("llama", tmp_path / "model")
    builders.edit_config(tmp_path / "model", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"quantization_config \(gptq\): the weights are"):
        load(tmp_path / "model")


@pytest.mark.slow
def test_statistics_reach_quantize_load_and_convert(tmp_path):
    source = builders.MODELS / "ernie4_5_moe"
    floats = load(source)
    tokens = np.random.default_rng(0).integers(0, floats.config.vocab_size, (2, 16))
    seen = fdq.calibrate(floats, tokens)
    seen.save(tmp_path / "statistics.npz")
    scheme = {"*.down_proj": ["W4A16-g16", {"quantizer": "search"}], "*": "W8A8C8-static-kvchannel"}
    expected = quantize(floats, scheme, calibration=seen)
    unguided = quantize(floats, {"layers.0.mlp.down_proj": "W4A16-g16"})
    codes = [m.layers[0].mlp.down_proj.kernel.codes.get_value() for m in (unguided, expected)]
    assert np.any(np.asarray(codes[0]) != np.asarray(codes[1]))
    again = fdq.Calibration.load(tmp_path / "statistics.npz")
    assert_same(load(source, scheme, calibration=again), expected)
    fdq.convert(source, tmp_path / "out", scheme, calibration=again)
    converted = load(tmp_path / "out")
    assert_same(converted, expected)
    assert inspect(tmp_path / "out").provenance["calibration"] == seen.digest
    assert converted.recipe_record == expected.recipe_record
    # With tokens, what fdq.calibrate would have seen.
    fdq.convert(source, tmp_path / "tokens", scheme, calibration=tokens)
    assert_same(load(tmp_path / "tokens"), expected)
