"""Directories as they come: files beside the model, old buffers, other prefixes, one sharding."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fdq
from fdq_checkpoints import CheckpointError, inspect, load
from tests.checkpoints import builders


@pytest.fixture
def folder(tmp_path):
    builders.model("llama", tmp_path / "model")
    return tmp_path / "model"


def edited(folder, change):
    tensors = builders.tensors_of(folder / "model.safetensors")
    builders.write(folder / "model.safetensors", change(tensors))


@pytest.mark.parametrize(
    "name", ["value_head", "optimizer", "mtp", "pytorch_lora_weights", "consolidated"]
)
def test_other_files_beside_a_whole_model(folder, name):
    builders.write(folder / f"{name}.safetensors", {"x": np.zeros(3, np.float32)})
    assert load(folder).config.model_type == "llama"


def test_an_index_that_was_left_over(folder):
    content = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    assert load(folder).config.model_type == "llama"


@pytest.mark.parametrize("name", ["masked_bias", "bias", "rotary_emb.inv_freq"])
def test_buffers_of_old_exporters(folder, name):
    buffer = {f"model.layers.0.self_attn.{name}": np.zeros((1, 1, 4, 4), np.float32)}
    edited(folder, lambda tensors: tensors | buffer)
    assert load(folder).config.model_type == "llama"


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda n: f"language_model.{n}", "All names begin with 'language_model.'"),
        (lambda n: f"_orig_mod.{n}", "All names begin with '_orig_mod.'"),
        (lambda n: n.removeprefix("model."), "All names lack 'model.'"),
    ],
)
def test_names_with_another_beginning(folder, rename, said):
    edited(folder, lambda tensors: {rename(n): a for n, a in tensors.items()})
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_the_head_of_a_training_run(folder):
    edited(folder, lambda tensors: tensors | {"v_head.summary.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="value head of a training run"):
        load(folder)


@pytest.mark.parametrize(
    "keys",
    [
        {"max_sequence_length": 2048},
        {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "guidance_scale": 2.0},
        {"renormalize_logits": True, "cache_implementation": "static", "penalty_alpha": 0.6},
    ],
)
def test_keys_that_change_nothing(folder, keys):
    builders.edit_config(folder, **keys)
    assert load(folder).config.model_type == "llama"


@pytest.mark.parametrize("keys", [("quantization",), ("quantization", "quantization_config")])
def test_codes_of_mlx_are_no_floats(folder, keys):
    builders.edit_config(folder, **{key: {"group_size": 32, "bits": 4} for key in keys})
    name = "model.layers.0.self_attn.q_proj"
    codes = {
        f"{name}.weight": np.zeros((64, 8), np.int32),
        f"{name}.scales": np.zeros((64, 2), np.float16),
        f"{name}.biases": np.zeros((64, 2), np.float16),
    }
    edited(folder, lambda tensors: tensors | codes)
    table = inspect(folder)
    assert table.scheme == "MLX, 4 bits in groups of 32"
    assert "float model" not in str(table)
    with pytest.raises(CheckpointError, match="quantized already: MLX, 4 bits"):
        load(folder)


def test_codes_that_no_config_speaks_of_are_no_floats(folder):
    codes = {"model.layers.0.self_attn.q_proj.weight": np.zeros((64, 8), np.int32)}
    edited(folder, lambda tensors: tensors | codes)
    table = inspect(folder)
    assert str(table.scheme).startswith("an unknown tool, bits unknown")
    with pytest.raises(CheckpointError, match=r"is int32|has shape"):
        load(folder)


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (lambda mesh: NamedSharding(mesh, P(None, "tp")), "does not fit it .*; give a function"),
        (lambda mesh: NamedSharding(mesh, P(None, None, "tp")), "does not fit it"),
        (lambda mesh: mesh, "expected jax.sharding.NamedSharding"),
        (lambda mesh: P(None, "tp"), "expected jax.sharding.NamedSharding"),
        (lambda mesh: 3, "expected jax.sharding.NamedSharding"),
        (lambda mesh: lambda path, a: P("tp"), "sharding of .*: expected jax.sharding.NamedSh"),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_a_sharding_that_does_not_fit_is_named(folder, tmp_path, of, said, stored):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    path = folder
    if stored:
        path = tmp_path / "stored"
        fdq.save(load(folder), path)
    with pytest.raises((CheckpointError, ValueError), match=said):
        load(path, sharding=of(mesh))
