"""Conversion: what it makes, what a kill leaves, and which sources it takes."""

import hashlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdq.quantizers.quantization import quantize
from fdq_checkpoints import CheckpointError, convert, inspect, load, save
from fdq_checkpoints.store import orbax_store
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same
from tests.covering import longest, slow

SOURCE = builders.MODELS / "ernie4_5_moe"


@pytest.mark.parametrize("scheme", [slow("W8A16C8"), {"*.experts": "W4A8-g16", "*": "W8A16"}])
def test_converting_loading_and_quantizing_agree(tmp_path, scheme):
    convert(SOURCE, tmp_path / "a", scheme)
    converted = load(tmp_path / "a")
    online = load(SOURCE, scheme)
    assert_same(online, converted)
    assert_same(quantize(load(SOURCE), scheme), converted)
    assert converted.scheme == online.scheme and converted.scheme is not None
    assert converted.recipe_record == online.recipe_record
    save(converted, tmp_path / "again")
    assert_same(converted, load(tmp_path / "again"))
    with pytest.raises(CheckpointError, match="quantized already"):
        convert(tmp_path / "a", tmp_path / "b", "W8A16")


@pytest.mark.parametrize(
    "point", [longest("tensor:1"), slow("tensor:9"), longest("unrecorded"), slow("finalized")]
)
def test_a_killed_conversion_leaves_nothing_that_loads_and_goes_on(tmp_path, point, monkeypatch):
    root = pathlib.Path(__file__).parents[2]
    script = pathlib.Path(__file__).with_name("interrupted_conversion.py")
    folders = os.pathsep.join([str(root), str(root / "checkpoints")])
    environment = os.environ | {"PYTHONPATH": folders, "JAX_PLATFORMS": "cpu"}
    destination = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, script, SOURCE, destination, point], env=environment, check=False
    )
    assert done.returncode == -9
    pending = tmp_path / "out.fdq-tmp"
    assert [path.name for path in tmp_path.iterdir()] == [pending.name]
    for path in (destination, pending, pending / "weights"):
        with pytest.raises((CheckpointError, FileNotFoundError)):
            load(path)
    monkeypatch.setattr(orbax_store, "MIN_BATCH_BYTES", 1)
    fresh = []
    convert(SOURCE, destination, "W8A16", progress=lambda *step: fresh.append(step[2]))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # 28 tensors; what the journal has is not made again.
    least = {"tensor:1": 27, "tensor:9": 19, "unrecorded": 25, "finalized": 0}[point]
    # The last batches were being written.
    assert least <= len(fresh) <= (least and least + 2)
    assert_same(load(SOURCE, "W8A16"), load(destination))
    assert sorted(path.name for path in destination.iterdir()) == [
        "config.json",
        "fdq.json",
        "weights",
    ]


@pytest.mark.slow
def test_static_scales_come_from_sample_tokens(tmp_path):
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    options = {"calibration": tokens}
    convert(builders.MODELS / "qwen3", tmp_path / "out", "W8A8-static", **options)
    converted = load(tmp_path / "out")
    assert_same(load(builders.MODELS / "qwen3", "W8A8-static", **options), converted)
    assert converted.layers[0].mlp.down_proj.activation_scale.get_value() > 0
    sample = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    said = str(inspect(tmp_path / "out"))
    assert f"of 32 tokens, text sha256 {sample[:16]}" in said
    logits = jax.jit(lambda model, tokens: model(tokens))(converted, tokens)
    assert bool(jnp.isfinite(logits).all())


def test_errors_before_anything_is_finished_leave_nothing(tmp_path):
    tensors = builders.model("llama", tmp_path / "model")
    bad = tensors["model.layers.0.self_attn.k_proj.weight"].copy()
    bad[2, 1] = np.nan
    builders.write(
        tmp_path / "model" / "model.safetensors",
        tensors | {"model.layers.0.self_attn.k_proj.weight": bad},
    )
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: tensor 'model\.layers\.0\.self_attn\.k_proj\.weight' holds nan "
        r"at \[2, 1\] \(layers\.0\.self_attn\.qkv_proj\.kernel\)\. Expected finite weights",
    ):
        load(tmp_path / "model", "W8A16")
    with pytest.raises(ValueError, match="Unknown quantization scheme"):
        convert(tmp_path / "model", tmp_path / "out", "W5A16")
    with pytest.raises(ValueError, match="matches no"):
        convert(tmp_path / "model", tmp_path / "out", {"layers.7": "W8A16", "*": "W8A16"})
    with pytest.raises(CheckpointError, match="a static scale must be calibrated"):
        convert(tmp_path / "model", tmp_path / "out", "W8A8-static")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(SOURCE, tmp_path / "there", "W8A16")
    for inside in ("model", "model/out", "model/../model/out"):
        with pytest.raises(FileExistsError, match="is inside the source"):
            convert(tmp_path / "model", tmp_path / inside, "W8A16", overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {"out.fdq-tmp"} == {"model", "there"}
    (tmp_path / "empty").mkdir()
    convert(SOURCE, tmp_path / "empty", "W8A16")
    assert load(tmp_path / "empty").scheme == "W8A16C16"


def test_a_saved_float_model_can_be_converted_or_quantized_while_loading(tmp_path):
    save(load(builders.MODELS / "qwen3"), tmp_path / "float")
    convert(tmp_path / "float", tmp_path / "out", "W8A16")
    expected = load(builders.MODELS / "qwen3", "W8A16")
    assert_same(expected, load(tmp_path / "out"))
    assert_same(expected, load(tmp_path / "float", "W8A16"))


def test_fastdeploy_rounding_reaches_the_files(tmp_path):
    scheme, options = "wint4", {"compat": "fastdeploy"}
    convert(SOURCE, tmp_path / "out", scheme, **options)
    converted = load(tmp_path / "out")
    assert_same(quantize(load(SOURCE), scheme, **options), converted)
    kernel = converted.layers[1].mlp.experts.gate_up_proj.kernel
    assert kernel.spec.format == "int4"
    assert converted.layers[0].mlp.down_proj.kernel.spec.format == "int8"
