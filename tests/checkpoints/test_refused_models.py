"""Quantized checkpoints that cannot be: each is refused by name."""

import numpy as np
import pytest

import fdq
from fdq_checkpoints import CheckpointError, inspect, load
from tests.checkpoints import builders, foreign


def broken(kind, change, tmp_path, rng, **config):
    foreign.model(kind, tmp_path / "model", rng)
    path = tmp_path / "model/model.safetensors"
    tensors = {name: np.array(a) for name, a in builders.tensors_of(path).items()}
    change(tensors)
    builders.write(path, tensors)
    if config:
        content = foreign.CONFIGS[kind][0] | config
        builders.edit_config(tmp_path / "model", quantization_config=content)
    return tmp_path / "model"


def _set(end, value):
    def change(tensors):
        name = next(n for n in tensors if n.endswith(end))
        tensors[name].reshape(-1)[0] = value

    return change


def _zeros(end):
    def change(tensors):
        name = next(n for n in tensors if n.endswith(end))
        tensors[name] = np.zeros_like(tensors[name])

    return change


def _remove(end):
    return lambda tensors: tensors.pop(next(n for n in tensors if n.endswith(end)))


def _nothing(tensors):
    del tensors


def _reshape(end, shape):
    def change(tensors):
        name = next(n for n in tensors if n.endswith(end))
        tensors[name] = tensors[name].reshape(shape)

    return change


def _negative(tensors):
    name = next(n for n in tensors if n.endswith("weight_scale"))
    tensors[name].view(np.uint8).reshape(-1)[0] |= 0x80


def _beside(tensors):
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((64, 128), np.float32)


def _biased(tensors):
    tensors["model.layers.0.mlp.down_proj.bias"] = np.ones(64, np.float16)


def _permuted(tensors):
    name = next(n for n in tensors if n.endswith("g_idx"))
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])


def of_asymmetric():
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    return foreign.of_groups("int-quantized", weights)


def of_bits(format, bits, type):
    return foreign.of_groups(format, {"num_bits": bits, "type": type, "strategy": "channel"})


@pytest.mark.parametrize(
    ("kind", "change", "config", "said"),
    [
        ("gptq", _set(".scales", np.nan), {}, "scales' holds a scale that is not finite"),
        ("gptq v2, 4 bits", _set(".scales", -1), {}, "negative"),
        ("gptq", _zeros(".scales"), {}, "all scales of 'model.layers.* are 0, its codes are not"),
        ("int8", _zeros("weight_scale"), {}, "are 0, its codes are not"),
        ("nvfp4", _zeros("weight_scale"), {}, "are 0, its codes are not"),
        ("nf4", _zeros(".absmax"), {}, "are 0, its codes are not"),
        ("gptq", _remove(".qzeros"), {}, "qzeros' is missing beside the codes"),
        ("gptq", _set(".qzeros", 0), {}, "other zero points than 8"),
        ("gptq", _nothing, {"bits": 5}, "bits = 5, expected 2 or 3 or 4 or 8"),
        ("gptq", _nothing, {"bits": "4"}, "bits = '4', expected"),
        ("gptq", _nothing, {"group_size": 0}, "group_size = 0, expected"),
        ("gptq", _nothing, {"group_size": 48}, "groups of 48 rows do not divide"),
        ("gptq", _nothing, {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        ("gptq", _nothing, {"dynamic": {"+:.*down.*": {"bits": 8}}}, "qzeros' is int32"),
        ("gptq", _nothing, {"dynamic": {"-:.*down.*": {}}}, "has codes, but config.json leaves"),
        ("gptq", _nothing, {"dynamic": {"(a+)+b": {"bits": 8}}}, "repeats too much"),
        ("gptq", _nothing, {"dynamic": {".*up.*": {"rotation": "x"}}}, "rotation = 'x', expected"),
        ("gptq", _nothing, {"dynamic": {".*up.*": {"bits": 5}}}, "bits = 5, expected"),
        ("gptq", _nothing, {"dynamic": {".*up.*": 8}}, "an object"),
        (
            "gptq",
            _nothing,
            {"extra_config": {"model.layers.1.mlp": {"bits": 16}}},
            "has codes, but",
        ),
        (
            "gptq",
            _nothing,
            {"extra_config": {"model.layers.1.mlp": {"bits": 8}}},
            "qzeros' is int32",
        ),
        ("awq", _nothing, {"version": "gemv"}, "version = 'gemv', expected gemm"),
        ("packed", _nothing, {"config_groups": None}, "config_groups"),
        ("packed", _nothing, {"transform_config": {"R1": {}}}, "rotations of weights are not und"),
        ("gptq", _nothing, {"is_marlin_format": True}, "Marlin's layout"),
        ("gptq", _nothing, {"pack_dtype": "int16"}, "pack_dtype = 'int16'"),
        ("packed", _nothing, {"ignore": ["re:.*down_proj"]}, "has codes, but config.json leaves"),
        ("packed", _nothing, {"ignore": ["re:(a+)+b"]}, "repeats too much"),
        ("packed", _nothing, {"ignore": ["re:("]}, "is no regular expression"),
        ("packed", _set("weight_shape", 7), {}, "are no 4-bit codes of"),
        ("packed", _remove("weight_scale"), {}, "missing"),
        ("float8", lambda t: _nan(t), {}, "holds NaN"),
        ("fine-grained float8", _remove("weight_scale_inv"), {}, "codes without scales"),
        ("fine-grained float8", _nothing, {"weight_block_size": [0, 128]}, "two sizes"),
        (
            "fine-grained float8",
            _nothing,
            {"activation_scheme": "static"},
            "input_scale' is missing",
        ),
        ("int8, static", _set("input_scale", 0), {}, "0, which is no scale"),
        ("int8, static", _set("input_scale", np.nan), {}, "not finite"),
        ("int8, static", _remove("input_scale"), {}, "input_scale' is missing"),
        ("nf4", _nothing, {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type = 'fp4'"),
        ("nf4", _set("quant_map", 0.5), {}, "another codebook than NF4's"),
        ("nf4, twice", _reshape("nested_quant_map", (256, 1)), {}, "nested_quant_map' is float32"),
        ("nf4, twice", _reshape("nested_quant_map", (1, 256)), {}, "nested_quant_map' is float32"),
        ("nf4, twice", _set("nested_absmax", -9), {}, "negative"),
        ("llm.int8", _set("weight_format", 2), {}, "another layout than rows"),
        ("nvfp4", _negative, {}, "a scale that is negative"),
        ("modelopt nvfp4", _negative, {}, "a scale that is negative"),
        ("gptq", _beside, {}, "is beside the codes of the same layer"),
        ("gptq", _biased, {}, "bias' is not part of a llama model"),
        ("gptq", _permuted, {"desc_act": False}, "another order of rows, but desc_act is false"),
        ("gptq", _remove("g_idx"), {"desc_act": True}, "g_idx' is missing beside the codes"),
        ("gptq", _set("g_idx", 2), {"desc_act": True}, "groups that are not all of 32 rows"),
        ("gptq", _set("g_idx", -1), {"desc_act": True}, "no groups of 0 ... 3 for 128 rows"),
        ("int8", _nothing, of_asymmetric(), "weight_zero_point' is missing"),
        ("packed", _nothing, {"ignore": [r"re:(\w|\w)*!"]}, "repeats too much"),
        ("packed", _nothing, {"ignore": ["re:(a|aa)+!"]}, "repeats too much"),
        ("packed", _nothing, {"ignore": ["re:(.*a){12}!"]}, "repeats too much"),
        ("packed", _nothing, {"ignore": ["re:.*.*.*.*.*.*!"]}, "repeats too much"),
        ("modelopt nvfp4", _set("weight_scale_2", np.inf), {}, "expected one number above 0"),
        ("nvfp4", _set("weight_global_scale", 0), {}, "expected one number above 0"),
        ("nf4", _nothing, {"llm_int8_skip_modules": ["down_proj"]}, "has codes, but config.json"),
        ("nf4, twice", _set("nested_quant_map", np.nan), {}, "negative or not finite"),
        ("int8", _nothing, of_bits("int-quantized", 4, "int"), "num_bits = 4, expected 8"),
        ("float8", _nothing, of_bits("float-quantized", 8, "int"), "type = 'int', expected"),
        ("nvfp4", _nothing, of_bits("nvfp4-pack-quantized", 8, "float"), "num_bits = 8, expect"),
        (
            "modelopt fp8, static",
            _remove("o_proj.input_scale"),
            {},
            "o_proj.input_scale' is missing",
        ),
        ("packed", _nothing, {"format": "mxfp6-pack-quantized"}, "format = 'mxfp6-pack-quantized'"),
        ("packed, actorder", _remove("weight_g_idx"), {}, "weight_g_idx' is missing"),
        ("packed, actorder", _set("weight_g_idx", 9), {}, "no groups of 0 ... 3 for 128 rows"),
        ("modelopt awq, factors", _set("pre_quant_scale", np.nan), {}, "NaN or infinity"),
        ("modelopt awq", _nothing, {"group_size": 48}, "groups of 48 rows do not divide"),
        ("modelopt awq", _nothing, {"quant_algo": "W4A8_AWQ"}, "quant_algo = 'W4A8_AWQ'"),
        ("modelopt awq", _nothing, {"quant_algo": "MIXED_PRECISION"}, "quantized_layers"),
        ("modelopt int8", _remove("input_scale"), {}, "input_scale' is missing"),
        ("mxfp4", _set("weight_scale", 255), {}, "holds NaN"),
        ("mlx", _nothing, {"bits": 7}, "bits = 7, expected"),
        ("mlx", _nothing, {"mode": "int3"}, "mode = 'int3', expected 'affine' or"),
        ("mlx", _remove(".biases"), {}, "biases' is missing beside the codes"),
        ("mlx", _remove(".scales"), {}, "is without scales. Download the model again"),
        ("hqq", _remove(".zero"), {}, "zero' is missing beside the codes"),
        ("gemma", _set("weight_scale", np.nan), {}, "negative or not finite"),
        ("gemma", _remove("weight_scale"), {}, "holds codes without scales"),
        ("gemma", _nothing, {"num_bits": 3}, "num_bits = 3, expected 2 or 4 or 8"),
        ("gemma", _nothing, {"num_bits": 8}, "weight' is uint8 .*, expected int8"),
        ("gemma", _nothing, {"module_quant_configs": {"(a+)+": {}}}, "repeats too much"),
        ("gemma", _nothing, {"module_quant_configs": {"down": 2}}, "down = 2, expected an object"),
        ("gemma", _nothing, {"module_quant_configs": {"(": {}}}, "is no regular expression"),
        ("gemma", _nothing, {"modules_to_not_convert": ["model"]}, "has codes, but config.json"),
    ],
)
def test_what_cannot_be_is_refused_by_name(kind, change, config, said, tmp_path, rng):
    folder = broken(kind, change, tmp_path, rng, **config)
    with pytest.raises(CheckpointError, match=said):
        load(folder)
    assert "quantized by another tool" in inspect(folder).kind


@pytest.mark.parametrize("end", ["codes", "companion", "float", "layer"])
@pytest.mark.parametrize("kind", ["gptq", "awq", "packed", "float8, blocks", "nf4", "modelopt awq"])
def test_tensors_that_do_not_fit_the_rest_are_refused(kind, end, tmp_path, rng):
    """Codes without scales and the other way round, norms of integers, layers too many."""
    foreign.model(kind, tmp_path / "model", rng)
    module, absent = "model.layers.1.mlp.down_proj", "model.layers.9.mlp.down_proj"

    def change(tensors):
        ends = [n[len(module) + 1 :] for n in tensors if n.startswith(module + ".")]
        first = next(e for e in ends if e in ("qweight", "weight_packed", "weight"))
        others = [e for e in ends if "scale" in e or "absmax" in e]
        if end == "codes":
            del tensors[f"{module}.{first}"]
        elif end == "companion":
            del tensors[f"{module}.{others[0]}"]
        elif end == "float":
            tensors["model.norm.weight"] = np.ones(64, np.int32)
        else:
            tensors.update({f"{absent}.{e}": tensors[f"{module}.{e}"] for e in ends})

    builders.change_tensors(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=r"model\.(norm|layers)"):
        load(tmp_path / "model")


def test_files_that_contradict_each_other_are_refused(tmp_path, rng):
    foreign.model("awq", tmp_path / "model", rng)
    side = tmp_path / "model/quant_config.json"
    side.write_text('{"w_bit": 4, "q_group_size": 32, "version": "GEMM"}')
    load(tmp_path / "model")
    side.write_text('{"w_bit": 4, "q_group_size": 128, "version": "GEMM"}')
    with pytest.raises(CheckpointError, match="group_size is 128, but .* says 32"):
        load(tmp_path / "model")


def test_what_is_left_out_or_in_floats_is_told(tmp_path, rng, caplog):
    decoded = foreign.model("packed", tmp_path / "model", rng)
    module = "model.layers.1.self_attn.o_proj"

    def change(tensors):
        for name in [n for n in tensors if n.startswith(module)]:
            del tensors[name]
        tensors[f"{module}.weight"] = np.ascontiguousarray(decoded[f"{module}.weight"])
        tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)

    builders.change_tensors(tmp_path / "model", change)
    model = load(tmp_path / "model")
    assert f"{module} and 0 more layers are in floats, which the config does not say" in caplog.text
    assert "self_attn.k_scale and 0 more scales of a KV cache are left out" in caplog.text
    assert not isinstance(model.layers[1].self_attn.o_proj.kernel, fdq.QTensor)
    caplog.clear()
    said = foreign.CONFIGS["packed"][0]
    builders.edit_config(
        tmp_path / "model", quantization_config=said | {"ignore": ["lm_head", module]}
    )
    load(tmp_path / "model")
    assert "in floats" not in caplog.text


def _nan(tensors):
    name = next(n for n in tensors if n.endswith("_proj.weight"))
    tensors[name].view(np.uint8).reshape(-1)[0] = 0x7F
