"""Adapters of PEFT, in and out: fixtures that peft made, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.nn.parameters import value
from fdq_checkpoints import CheckpointError
from tests.adapters.test_lora import loaded, moved
from tests.checkpoints import builders
from tests.closeness import assert_close, difference, error
from tests.covering import slow

CASES = builders.MODELS.parent / "peft"
with np.load(builders.MODELS / "llama" / "expected.npz") as _file:
    IDS = _file["input_ids"]
PREFIX = "base_model.model."


def logits(model):
    return jax.jit(lambda model, ids: model(ids))(model, IDS)


def parameters(model):
    return nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))


def assert_same_adapters(one, other):
    one, other = dict(parameters(one)), dict(parameters(other))
    assert one.keys() == other.keys()
    for path, parameter in one.items():
        assert parameter.dtype == other[path].dtype
        np.testing.assert_array_equal(parameter.get_value(), other[path].get_value())


@pytest.mark.parametrize("name", ["patterns", slow("all_linear")])
def test_logits_are_those_of_peft(name, tmp_path):
    with np.load(CASES / name / "expected.npz") as file:
        expected = dict(file)
    model = loaded("llama", None)
    tuned = fdq.load_lora(model, CASES / name)
    found = logits(tuned)
    assert_close(found, expected["logits"], of_largest=1e-5)
    assert error(logits(model), expected["logits"]) > 0.3
    merged = fdq.merge_lora(tuned)
    q = expected["merged"].T
    kernel = value(merged.layers[1].self_attn.qkv_proj.kernel)
    assert_close(kernel[:, : q.shape[1]], q, of_largest=1e-6)
    assert_close(logits(merged), expected["logits"], of_largest=1e-5)
    fdq.save_lora(tuned, tmp_path / "again", base="models/llama")
    assert_same_adapters(tuned, fdq.load_lora(model, tmp_path / "again"))
    theirs, ours = (
        builders.tensors_of(folder / "adapter_model.safetensors")
        for folder in (CASES / name, tmp_path / "again")
    )
    theirs.pop(f"{PREFIX}lm_head.base_layer.weight", None)
    assert theirs.keys() == ours.keys()
    for key, array in theirs.items():
        np.testing.assert_array_equal(array, ours[key])
    config, old = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "again", CASES / name)
    )
    # PEFT writes whole names where it found all linear layers.
    assert set(config["target_modules"]) == {m.split(".")[-1] for m in old["target_modules"]}
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "models/llama"


def test_adapters_stand_beside_any_scheme_and_are_saved_with_a_model(tmp_path):
    model = loaded("llama", "W8A16")
    tuned = fdq.load_lora(model, CASES / "patterns")
    with np.load(CASES / "patterns" / "expected.npz") as file:
        expected = file["logits"]
    assert difference(logits(tuned), expected) < 2e-3 < difference(logits(model), expected)
    fdq.save(tuned, tmp_path / "whole")
    template = fdq.load_lora(loaded("llama", "W8A16"), CASES / "patterns")
    assert_same_adapters(tuned, fdq.load(tmp_path / "whole", template=moved(template)))


@pytest.mark.slow
def test_each_expert_has_its_own(tmp_path):
    tuned = moved(fdq.lora(loaded("qwen3_moe", "W4A16-g16"), rank=2, targets=("mlp", "o_proj")))
    fdq.save_lora(tuned, tmp_path / "experts")
    names = set(builders.tensors_of(tmp_path / "experts" / "adapter_model.safetensors"))
    assert f"{PREFIX}model.layers.0.mlp.experts.7.up_proj.lora_B.weight" in names
    assert f"{PREFIX}model.layers.1.self_attn.o_proj.lora_A.weight" in names
    again = fdq.load_lora(loaded("qwen3_moe", None), tmp_path / "experts")
    assert_same_adapters(tuned, again)


def test_layers_of_other_modules(tmp_path):
    own = fdq.quantize(nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), jnp.tanh), "W8A16")
    tuned = moved(fdq.lora(own, rank=2, alpha=0.5, dtype=jnp.bfloat16))
    fdq.save_lora(tuned, tmp_path / "own")
    assert_same_adapters(tuned, fdq.load_lora(own, tmp_path / "own"))
    with pytest.raises(FileExistsError, match="exists already"):
        fdq.save_lora(tuned, tmp_path / "own")
    fdq.save_lora(tuned, tmp_path / "own", overwrite=True)
    with pytest.raises(ValueError, match=r"has no adapters of fdq\.lora"):
        fdq.save_lora(own, tmp_path / "none")


def test_names_may_begin_as_a_multimodal_model_has_them(tmp_path):
    model = nnx.clone(loaded("gemma3", None))
    model.config = model.config.replace(model_type="gemma3")
    tuned = moved(fdq.lora(model, rank=2, targets="v_proj"))
    fdq.save_lora(tuned, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = builders.tensors_of(file)
    old, new = f"{PREFIX}model.", f"{PREFIX}model.language_model."
    builders.write(file, {name.replace(old, new): a for name, a in tensors.items()})
    assert_same_adapters(tuned, fdq.load_lora(model, file.parent))


def changed_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def changed_tensors(change):
    def run(folder):
        path = folder / "adapter_model.safetensors"
        tensors = builders.tensors_of(path)
        change(tensors)
        builders.write(path, tensors)

    return run


Q = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
HEAD = f"{PREFIX}lm_head.base_layer.weight"
BROKEN = {
    "dora": (changed_config(use_dora=True), "use_dora 'True': DoRA"),
    "bias": (changed_config(bias="all"), "bias 'all': biases of the model were trained"),
    "kind": (changed_config(peft_type="IA3"), "peft_type 'IA3', expected 'LORA'"),
    "start": (changed_config(init_lora_weights="pissa_niter_4"), "changed the weights"),
    "layers": (changed_config(modules_to_save=["lm_head"]), "modules_to_save .*: whole layers"),
    "unknown": (changed_config(use_xlora=True), "use_xlora 'True': which fdq does not know"),
    "regex": (changed_config(rank_pattern={"(a+)+$": 2}), "is a regular expression"),
    "rank": (changed_config(r=2**40), "r '1099511627776', expected a whole number"),
    "alpha": (changed_config(lora_alpha="16"), "lora_alpha '16', expected a number"),
    "another rank": (changed_config(r=8), r"has shape \(3, 64\), expected \(8, 64\)"),
    "no layer": (
        changed_tensors(
            lambda t: t.update({Q.replace("q_", "x_") + "A.weight": t[Q + "A.weight"]})
        ),
        "has no linear layer 'model.layers.0.self_attn.x_proj'. The nearest .*_proj'",
    ),
    "half": (changed_tensors(lambda t: t.pop(Q + "B.weight")), "has lora_A.weight alone"),
    "embedding": (
        changed_tensors(
            lambda t: t.update({f"{PREFIX}model.embed_tokens.lora_embedding_A": t[HEAD]})
        ),
        "lora_embedding_A.*the adapters of linear layers",
    ),
    "infinite": (
        changed_tensors(
            lambda t: t.update({Q + "A.weight": t[Q + "A.weight"] * np.float32(np.inf)})
        ),
        "has NaN or infinity",
    ),
    "integers": (
        changed_tensors(lambda t: t.update({Q + "A.weight": np.ones((3, 64), np.int32)})),
        "is int32, expected floats",
    ),
    "another head": (
        changed_tensors(lambda t: t.update({HEAD: t[HEAD] + np.float32(1)})),
        "is not the model's",
    ),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "no adapter_model.safetensors. adapter_model.bin is a pickle",
    ),
    "cut": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10" + bytes(20)),
        "adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_adapters_are_refused_by_name(case, tmp_path):
    change, message = BROKEN[case]
    folder = tmp_path / "adapters"
    shutil.copytree(CASES / "patterns", folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        fdq.load_lora(loaded("llama", None), folder)


def test_what_has_no_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        fdq.load_lora(loaded("llama", None), tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"experts\.down_proj: PEFT has no adapters of"):
        fdq.save_lora(fdq.lora(loaded("gpt_oss", None), targets="experts"), tmp_path / "out")
    with pytest.raises(ValueError, match="has adapters already"):
        fdq.load_lora(fdq.load_lora(loaded("llama", None), CASES / "patterns"), CASES / "patterns")
