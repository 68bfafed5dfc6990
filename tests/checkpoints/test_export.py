"""Models go out in other programs' layouts: bit for bit, whole or not at all, or refused by name.

What those programs make of them `tests/oracles/check_exports.py` says, which needs their code.
"""

import json
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.models.family import Layout, Rule
from fdq_checkpoints import CheckpointError, convert, load, tree_paths
from fdq_checkpoints.exporting import export
from fdq_checkpoints.sources import tensor_names
from tests.checkpoints import builders, foreign
from tests.checkpoints.exports import NARROW, WIDE, config_of, differences, model_of, stored
from tests.covering import slow, slow_but
from tests.models.test_gemma3 import multimodal

OWNED = builders.MODELS.parent / "quantized"


# By kind of foreign model, the exporters that hold what fdq makes of it.
ROUND_TRIPS = {
    "gptq": ("gptq", "gptq_v2", "compressed-tensors"),
    "gptq v2, 4 bits": ("gptq_v2", "compressed-tensors"),
    "gptq, 3 bits": ("gptq", "compressed-tensors"),
    "gptq, 2 bits": ("gptq", "compressed-tensors"),
    "gptq, 8 bits": ("gptq", "compressed-tensors"),
    "gptq, desc_act": ("gptq",),
    "awq": ("awq", "gptq_v2", "compressed-tensors"),
    "packed": ("gptq", "compressed-tensors"),
    "packed, 8 bits": ("gptq", "compressed-tensors"),
    "packed, 3 bits": ("gptq", "compressed-tensors"),
    "packed, asymmetric": ("gptq_v2", "compressed-tensors"),
    "int8": ("compressed-tensors",),
    "int8, static": ("compressed-tensors",),
    "float8": ("compressed-tensors", "fp8"),
    "mxfp4": ("mxfp4", "compressed-tensors"),
    "nf4": ("bitsandbytes",),
    "nf4, twice": ("bitsandbytes",),
    "llm.int8": ("compressed-tensors",),
}
PAIRS = [(kind, to) for kind, targets in ROUND_TRIPS.items() for to in targets]
QUICK = {
    ("gptq", "gptq"),
    ("gptq v2, 4 bits", "gptq_v2"),
    ("gptq, desc_act", "gptq"),
    ("awq", "awq"),
    ("int8, static", "compressed-tensors"),
    ("mxfp4", "mxfp4"),
    ("nf4, twice", "bitsandbytes"),
}


@pytest.mark.parametrize("pair", slow_but({str(pair) for pair in QUICK}, PAIRS), ids=str)
def test_what_is_written_is_read_as_it_was(pair, tmp_path, rng):
    """Every array, and how inputs are quantized; from fdq's checkpoint, or straight from theirs."""
    kind, to = pair
    source = tmp_path / "theirs"
    foreign.model(kind, source, rng)
    if "static" in kind:
        convert(source, tmp_path / "kept", None)
        source = tmp_path / "kept"
    made = export(source, tmp_path / "out", to=to)
    assert sum(made.formats.values()) > 10
    before, after = load(source), load(tmp_path / "out")
    assert not differences(before, after)
    assert sum(isinstance(t.value, fdq.QTensor) for t in tree_paths.flatten(after)) >= 8


@pytest.mark.parametrize(("kind", "to"), [("gptq", "gptq"), ("packed", "compressed-tensors")])
def test_experts_come_apart_and_together_again(kind, to, tmp_path, rng):
    """Without a checkpoint of fdq's between: from one layout into the other."""
    decoded = foreign.model(kind, tmp_path / "theirs", rng, "qwen3_moe")
    export(tmp_path / "theirs", tmp_path / "out", to=to, shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert not differences(load(tmp_path / "theirs"), load(tmp_path / "out"))
    said = config_of(tmp_path / "out")["quantization_config"]
    if to == "compressed-tensors":
        assert said["ignore"] == ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate", "lm_head"]
    assert said["quant_method"] == to
    export(tmp_path / "theirs", tmp_path / "floats", to="dense", dtype="float32")
    floats = stored(tmp_path / "floats")
    assert floats.keys() == decoded.keys()
    for name, array in decoded.items():
        np.testing.assert_allclose(floats[name], array, rtol=2e-7)


# By checkpoint that its owner saved, the exporter, and what it may say otherwise.
FIXTURES = {
    "w4": "compressed-tensors",
    "w4_asym": "compressed-tensors",
    "w3": "compressed-tensors",
    "w8": "compressed-tensors",
    "w8a8": "compressed-tensors",
    "w8a8_static": "compressed-tensors",
    "fp8": "fp8",
    "nf4": "bitsandbytes",
}
UNSAID = {"version", "sparsity_config", "transform_config", "moe_sparsity_config"}


@pytest.mark.parametrize("name", FIXTURES)
def test_files_of_their_owners_come_out_as_they_went_in(name, tmp_path):
    """compressed-tensors and bitsandbytes wrote them: each tensor has the same bytes again."""
    export(OWNED / name, tmp_path / "out", to=FIXTURES[name])
    theirs, ours = stored(OWNED / name), stored(tmp_path / "out")
    if name == "nf4":  # JSON in bytes
        state = "quant_state.bitsandbytes__nf4"
        for key in [key for key in theirs if key.endswith(state)]:
            a, b = (json.loads(bytes(found.pop(key))) for found in (theirs, ours))
            assert a == b
    assert theirs.keys() == ours.keys()
    for key, array in theirs.items():
        same = (array.dtype, array.shape, array.tobytes())
        assert same == (ours[key].dtype, ours[key].shape, ours[key].tobytes()), key
    wanted, found = config_of(OWNED / name), config_of(tmp_path / "out")
    said, meant = found.pop("quantization_config"), wanted.pop("quantization_config")
    assert found == wanted
    if FIXTURES[name] != "bitsandbytes":
        assert said == {key: value for key, value in meant.items() if key not in UNSAID}


@pytest.mark.parametrize("name", slow_but({"fp8_static"}, ["fp8_static", "fp8_block", "nvfp4"]))
def test_layers_that_fdq_does_not_join_come_out_as_they_went_in(name, tmp_path):
    """Scales of q, k and v become those of channels or groups: other layers are the same bytes."""
    export(OWNED / name, tmp_path / "out", to="compressed-tensors")
    theirs, ours = stored(OWNED / name), stored(tmp_path / "out")
    compared = [key for key in theirs if ".o_proj." in key or ".down_proj." in key]
    assert len(compared) >= 8
    for key in compared:
        same = (theirs[key].dtype, theirs[key].shape, theirs[key].tobytes())
        assert same == (ours[key].dtype, ours[key].shape, ours[key].tobytes()), key
    assert not differences(load(OWNED / name), load(tmp_path / "out"))


def test_blocks_as_deepseek_publishes_them(tmp_path):
    model = model_of(WIDE, "block_wise_fp8")
    export(model, tmp_path / "out", to="fp8")
    tensors = stored(tmp_path / "out")
    module = "model.layers.0.self_attn.k_proj"
    assert tensors[f"{module}.weight_scale_inv"].shape == (1, 1)
    kernel = model.layers[0].self_attn.qkv_proj.kernel.canonical()
    np.testing.assert_array_equal(tensors[f"{module}.weight"].T, kernel.codes[:, 128:256])
    assert not differences(model, load(tmp_path / "out"))
    assert config_of(tmp_path / "out")["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }


@pytest.mark.slow
def test_blocks_across_two_layers_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="blocks lie across .*gate_proj .* --to dense dec"):
        export(model_of(NARROW, "block_wise_fp8"), tmp_path / "no", to="fp8")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("bits", "to"), [slow(2, "gptq"), (4, "compressed-tensors")])
def test_halves_are_the_odd_numbers_of_more_bits(bits, to, tmp_path):
    scheme = f"W{bits}A16-g32-half-f16"
    model = model_of(NARROW, scheme, method="absmax")
    made = export(model, tmp_path / "out", to=to)
    assert f"have no counterpart in {bits} bits" in " ".join(made.notes)
    for before, after in zip(model.layers, load(tmp_path / "out").layers, strict=True):
        a, b = before.mlp.down_proj.kernel.canonical(), after.mlp.down_proj.kernel.canonical()
        assert (a.spec.zero_point, b.spec.zero_point) == ("half", "none")
        assert b.spec.format == {2: "int4", 4: "int8"}[bits]
        np.testing.assert_array_equal(fdq.dequantize(a), fdq.dequantize(b))


def test_scales_of_both_signs_are_kept(tmp_path):
    """A search chooses them, where -8 is a code and 8 is none."""
    model = model_of(NARROW, "W4A16-g16-f16", method="absmax")
    kernel = model.layers[0].mlp.down_proj.kernel
    kernel.scale.set_value(-kernel.scale.get_value())
    for to in ("gptq", "compressed-tensors"):
        export(model, tmp_path / to, to=to)
        assert not differences(model, load(tmp_path / to))


def test_several_schemes_are_several_groups(tmp_path):
    recipe = {"*.down_proj": "W8A8", "*.o_proj": None, "*": "W4A16-g16"}
    rules = fdq.Recipe.parse(list(recipe.items()))
    model = model_of(NARROW.replace(num_layers=2), rules, method="absmax")
    export(model, tmp_path / "out", to="compressed-tensors")
    said = config_of(tmp_path / "out")["quantization_config"]
    assert said["format"] == "mixed-precision"
    targets = {g["format"]: g["targets"] for g in said["config_groups"].values()}
    assert targets["int-quantized"] == [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]
    assert len(targets["pack-quantized"]) == 5
    assert said["ignore"] == [
        *(f"model.layers.{i}.self_attn.o_proj" for i in range(2)),
        "lm_head",
    ]
    assert not differences(model, load(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"down_proj.kernel \(W8A8\).*GPTQ's config has no"):
        export(model, tmp_path / "no", to="gptq")


DENSE = (
    *("ernie4_5_moe", "ernie4_5_bias", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite"),
    *("gemma2", "gemma3", "gpt_oss"),
)


@pytest.mark.parametrize("base", slow_but({"ernie4_5_bias", "deepseek_v3", "gemma3"}, DENSE))
def test_dense_is_what_it_stands_for(base, tmp_path):
    """Of experts, shared ones, biases and a tied embedding; floats come back as they were.

    So do latents, norms that are stored less 1, and stacks of experts whose halves are interleaved.
    """
    model = fdq.quantize(load(builders.MODELS / base), "W8A8", method="absmax")
    made = export(model, tmp_path / "out", to="dense", dtype="float32")
    assert any("inputs stay in floats" in note for note in made.notes)
    floats = {t.path: t.value for t in tree_paths.flatten(load(tmp_path / "out"))}
    for tensor in tree_paths.flatten(model):
        value = tensor.value
        wanted = fdq.dequantize(value) if isinstance(value, fdq.QTensor) else value
        np.testing.assert_array_equal(floats[tensor.path], wanted)
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert model.config.tie_word_embeddings == ("lm_head.weight" not in stored(tmp_path / "out"))
    assert stored(tmp_path / "out").keys() == stored(builders.MODELS / base).keys()


def test_dense_in_sixteen_bits_says_so(tmp_path):
    model = model_of(NARROW, "W8A16", method="absmax")
    export(model, tmp_path / "out", to="dense", dtype="bfloat16")
    assert config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"
    kernel = load(tmp_path / "out").layers[0].mlp.down_proj.kernel[...]
    wanted = fdq.dequantize(model.layers[0].mlp.down_proj.kernel.canonical(), jnp.bfloat16)
    np.testing.assert_array_equal(kernel.astype(jnp.float32), wanted.astype(jnp.float32))


def test_static_scales_of_a_float8_cache_go_along(tmp_path):
    floats = model_of()
    scheme = "W8A8Cfp8-kvhead"
    tokens = np.arange(8).reshape(2, 4)
    model = fdq.quantize(floats, scheme, calibration=fdq.calibrate(floats, tokens), method="absmax")
    export(model, tmp_path / "out", to="compressed-tensors")
    said = config_of(tmp_path / "out")["quantization_config"]["kv_cache_scheme"]
    assert (said["type"], said["strategy"], said["dynamic"]) == ("float", "attn_head", False)
    name = "model.layers.0.self_attn.k_scale"
    wanted = model.layers[0].self_attn.k_cache_scale[...]
    np.testing.assert_array_equal(stored(tmp_path / "out")[name][..., 0], wanted)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_a_tensor_is_stored_in_the_layout_that_it_is_read_from(layout, rng):
    stored_as = rng.standard_normal((1, 6)).astype(np.float32)
    target = tensor_names.laid_out(stored_as, layout)
    shape = tuple(target.shape)
    (piece,) = tensor_names.pieces(
        ("kernel",), shape, (Rule("kernel", ("weight",), layout),), qkv_widths=(0, 0, 0)
    )
    again = piece.of(target)
    assert again.shape == piece.shape(shape) == stored_as.shape and again.dtype == np.float32
    np.testing.assert_array_equal(tensor_names.laid_out(again, layout), target)
    np.testing.assert_allclose(again, stored_as, rtol=0, atol=2.0**-24)


def test_stacks_of_experts_are_decoded_and_no_other_tool_has_codes_of_them(tmp_path):
    """Codes of a release of gpt-oss; transformers decoded what they are compared with."""
    folder = builders.MODELS.parent / "gpt_oss_mxfp4"
    expected = dict(np.load(folder / "expected.npz"))
    export(folder, tmp_path / "out", to="dense", dtype="float32")
    floats = stored(tmp_path / "out")
    for name in ("gate_up_proj", "down_proj"):
        found = floats[f"model.layers.1.mlp.experts.{name}"]
        np.testing.assert_array_equal(found[2], expected[name])
    assert load(tmp_path / "out").config == load(folder, dtype="float32").config
    with pytest.raises(CheckpointError, match=r"experts.*more\): gpt_oss.*one tensor.*--to dense"):
        export(folder, tmp_path / "no", to="compressed-tensors")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_gpt_oss_goes_out_as_it_is_published(tmp_path):
    """The tensors of the release, bit for bit; its config says what it said."""
    folder = builders.MODELS.parent / "gpt_oss_mxfp4"
    made = export(folder, tmp_path / "out", to="mxfp4")
    assert made.formats["mxfp4 of experts"] == 4
    before, after = (builders.tensors_of(f / "model.safetensors") for f in (folder, made.path))
    assert before.keys() == after.keys()
    for name, array in before.items():
        if ".router." in name:  # fdq holds it in float32
            array = array.astype(np.float32)
        assert array.dtype == after[name].dtype and array.shape == after[name].shape, name
        np.testing.assert_array_equal(array.view(np.uint8), after[name].view(np.uint8))
    said = [config_of(one)["quantization_config"] for one in (folder, made.path)]
    assert said[0] == said[1]
    model = fdq.quantize(load(builders.MODELS / "gpt_oss"), "W8A16-g8", method="absmax")
    with pytest.raises(CheckpointError, match=r"experts.*MXFP4 alone\. Export it --to dense"):
        export(model, tmp_path / "no", to="mxfp4")


@pytest.mark.slow
def test_stacks_in_floats_are_left_out_by_name(tmp_path):
    rules = fdq.Recipe([("*.self_attn.*", "W8A16-g16"), ("*", None)])
    model = fdq.quantize(load(builders.MODELS / "gpt_oss"), rules, method="absmax")
    export(model, tmp_path / "out", to="compressed-tensors")
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    layers = range(model.config.num_layers)
    assert {f"model.layers.{i}.mlp.experts" for i in layers} <= set(ignored)
    assert len(set(ignored)) == len(ignored) == 2 * len(layers) + 1
    assert not differences(model, load(tmp_path / "out"))


def test_of_a_multimodal_model_the_text_is_written(tmp_path):
    folder = multimodal(tmp_path / "model", "model.language_model.")
    made = export(folder, tmp_path / "out", to="dense")
    assert "Of gemma3 the text model alone is written, as gemma3_text." in made.notes
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert stored(tmp_path / "out").keys() == stored(builders.MODELS / "gemma3").keys()
    before, after = load(folder), load(tmp_path / "out")
    assert after.config == before.config.replace(model_type="gemma3_text")
    assert not differences(before, after)


def test_text_files_are_copied_and_the_config_is_the_models_own(tmp_path):
    folder = tmp_path / "theirs"
    builders.model("qwen3", folder)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text('{"eos_token_id": 2}')
    builders.edit_config(folder, license="mit", auto_map={"AutoModel": "code.Model"})
    convert(folder, tmp_path / "kept", "W8A16", method="absmax")
    made = export(tmp_path / "kept", tmp_path / "out", to="compressed-tensors")
    assert not made.notes
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    config = config_of(tmp_path / "out")
    assert (config["license"], config["architectures"]) == ("mit", ["Qwen3ForCausalLM"])
    assert "auto_map" not in config
    (tmp_path / "kept/tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: missing, or changed"):
        export(tmp_path / "kept", tmp_path / "again", to="compressed-tensors")


def test_offsets_that_are_zero_points_go_out_as_such(tmp_path, rng):
    """HQQ rounds them so in 4 bits; offsets of other numbers are refused."""
    foreign.model("hqq", tmp_path / "model", rng)
    tensors = builders.tensors_of(tmp_path / "model" / "model.safetensors")
    rounded = {n: np.rint(t) if n.endswith(".zero") else t for n, t in tensors.items()}
    builders.write(tmp_path / "model" / "model.safetensors", rounded)
    fdq.export(tmp_path / "model", tmp_path / "out", to="compressed-tensors")
    mine, theirs = fdq.load(tmp_path / "model"), fdq.load(tmp_path / "out")
    for path, one in ((t.path, t.value) for t in tree_paths.flatten(mine)):
        other = {t.path: t.value for t in tree_paths.flatten(theirs)}[path]
        if isinstance(one, tree_paths.QUANTIZED):
            assert (one.spec.zero_point, other.spec.zero_point) == ("offset", "integer")
            np.testing.assert_array_equal(one.codes, other.codes)
            np.testing.assert_array_equal(-other.zero.astype(jnp.float32) * one.scale, one.offset)
    again = model_of(NARROW, "W4A16-g16-affine-f16")
    with pytest.raises(CheckpointError, match=r"down_proj.*no whole multiples .* with -asym"):
        export(again, tmp_path / "no", to="gptq_v2")
