"""Single layers of MLX, HQQ and torchao, decoded like their owners' code decodes them."""

import json
import pathlib
import shutil
import struct

import numpy as np
import pytest

import fdq
from fdq_checkpoints import CheckpointError, inspect
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources.codec import Section
from fdq_checkpoints.sources.quantized_model import CODECS
from tests.checkpoints import builders

LAYERS = pathlib.Path(__file__).parents[1] / "oracles/layers"
NAMES = sorted(file.stem for file in LAYERS.glob("*.safetensors"))
# What fdq holds a layer as, where its name does not say it.
SPECS = {
    "mlx-4-g128": "W4-channel-affine-f16",
    "mlx-4-g64-bf16": "W4-g64-affine",
    "mlx-5-g64": "W8-g64-affine-f16",
    "mlx-6-g32": "W8-g32-affine-f16",
    "mlx-mxfp4": "WMXFP4",
    "mlx-nvfp4": "WNVFP4",
    "hqq-3-g64": "W3-g64-affine-f32",
    "hqq-4": "W4-channel-affine",
    "torchao-int8-tensor": "W8-tensor",
    "torchao-int4-g64-asym": "W4-g64-asym-f32",
    "torchao-int3": "W3-channel",
    "torchao-int2-g32-asym": "W2-g32-asym-f32",
    "torchao-fp8-block": "Wfp8-b64x16",
    "torchao-mxfp8": "WMXFP8",
}


def opened(name: str, folder: pathlib.Path):
    """The directory and the codec of a layer."""
    builders.model("llama", folder)
    shutil.copy(LAYERS / f"{name}.safetensors", folder / "model.safetensors")
    directory = SourceDirectory(folder)
    said = json.loads(directory.metadata_of("decoded")["quantization_config"])
    return directory, CODECS[name.partition("-")[0]](directory, Section(said, "config"))


@pytest.mark.parametrize("name", [name for name in NAMES if "axis0" not in name])
def test_layers_are_what_their_owners_code_decodes(name, tmp_path):
    """Codes exactly; a product and a sum are rounded once each, to float32."""
    directory, codec = opened(name, tmp_path / "model")
    with directory:
        decoded = directory.read("decoded")
        ((module, linear),) = codec.linears().items()
        assert module == "layer"
        q = codec.read(linear).qtensor()
    assert q.spec == linear.spec
    if name in SPECS:
        assert str(q.spec) == str(fdq.WeightSpec.parse(SPECS[name]))
    found = np.asarray(fdq.dequantize(q)).T
    assert found.shape == decoded.shape
    largest = np.abs(decoded).max(axis=1, keepdims=True)
    assert np.all(np.abs(found - decoded) <= 2.0**-22 * largest)
    exact = name.startswith("torchao") and not name.endswith("asym")
    if exact or name.startswith(("mlx-mx", "mlx-nv")):
        np.testing.assert_array_equal(found, decoded)


@pytest.mark.parametrize(
    ("name", "data", "activation"),
    [
        ("torchao-int3", {"activation_quantization": "int8_asym_per_token"}, None),
        ("torchao-int3", {"activation_quantization": "int8_sym_per_token"}, "A8"),
        ("torchao-mxfp8", {"act_quant_kwargs": {"_type": "QuantizeTensorToMXKwargs"}}, None),
        (
            "torchao-fp8",
            {
                "act_quant_kwargs": {
                    "_type": "QuantizeTensorToFloat8Kwargs",
                    "_data": {"granularity": {"_type": "PerRow"}},
                }
            },
            "Afp8",
        ),
    ],
)
def test_inputs_of_torchao_are_quantized_alike_or_not_at_all(
    name, data, activation, tmp_path, caplog
):
    opened(name, tmp_path / "model")[0].close()
    changed(tmp_path / "model", _nothing, _data(**data))
    with SourceDirectory(tmp_path / "model") as directory:
        (linear,) = CODECS["torchao"](directory, Section({}, "config")).linears().values()
    assert linear.activation == (activation and fdq.ActivationSpec.parse(activation))
    assert ("in a way that fdq has not" in caplog.text) == (activation is None)


def test_groups_along_out_are_refused(tmp_path):
    directory, codec = opened("hqq-4-g32-axis0", tmp_path / "model")
    with directory, pytest.raises(CheckpointError, match="along out .axis 0.*release with axis 1"):
        codec.linears()


def test_what_hqq_saves_by_itself_is_named(tmp_path):
    """Its config.json does not say that there are codes."""
    opened("hqq-4-g32", tmp_path / "model")[0].close()
    table = inspect(tmp_path / "model")
    assert str(table.scheme).startswith("HQQ")
    assert 'add "quantization_config": {"quant_method": "hqq"}' in table.advice


def changed(folder, change, metadata=None):
    """Tensors of a layer changed; `metadata` are changes of its description."""
    path = folder / "model.safetensors"
    tensors = {name: np.array(a) for name, a in builders.tensors_of(path).items()}
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    held = json.loads(data[8 : 8 + length])["__metadata__"]
    change(tensors)
    held |= metadata(held) if metadata else {}
    header, body = builders.header_of(tensors)
    path.write_bytes(builders.file_bytes({"__metadata__": held, **header}, body))


def _set(end, value):
    def change(tensors):
        tensors[f"layer.{end}"].reshape(-1)[0] = value

    return change


def _nothing(tensors):
    del tensors


def _remove(end):
    return lambda tensors: tensors.pop(f"layer.{end}")


def _add(end, value):
    return lambda tensors: tensors.update({f"layer.{end}": value})


def _cut(end):
    def change(tensors):
        tensors[f"layer.{end}"] = np.ascontiguousarray(tensors[f"layer.{end}"][..., :-1])

    return change


def _as(end, dtype):
    def change(tensors):
        tensors[f"layer.{end}"] = tensors[f"layer.{end}"].astype(dtype)

    return change


def _text(end, text):
    return _add(end, np.frombuffer(text, np.uint8))


def _data(**changes):
    """The description of torchao's with other data."""

    def metadata(held):
        content = json.loads(held["layer.weight"])
        content["_data"] |= changes
        return {"layer.weight": json.dumps(content)}

    return metadata


def _said(text):
    return lambda held: {"layer.weight": text}


def _config(**changes):
    def metadata(held):
        return {
            "quantization_config": json.dumps(json.loads(held["quantization_config"]) | changes)
        }

    return metadata


@pytest.mark.parametrize(
    ("name", "change", "metadata", "said"),
    [
        ("mlx-4-g32", _set("scales", np.nan), None, "scales' holds a scale that is not finite"),
        ("mlx-4-g32", _set("biases", np.inf), None, "biases' holds a scale that is not finite"),
        ("mlx-4-g32", _remove("biases"), None, "biases' is missing beside the codes"),
        ("mlx-4-g32", _remove("scales"), None, "is without scales. Download"),
        ("mlx-4-g32", _remove("weight"), None, "weight' is missing beside the codes"),
        ("mlx-4-g32", _cut("scales"), None, r"scales' is float16 \(24, 3\), expected .*\(24, 4\)"),
        ("mlx-4-g32", _as("biases", np.float32), None, "biases' is float32"),
        ("mlx-4-g32", _as("weight", np.int32), None, "weight' is int32"),
        ("mlx-4-g32", _nothing, _config(bits=7), "bits = 7, expected"),
        ("mlx-4-g32", _nothing, _config(bits=8), r"scales' is float16 \(24, 4\), expected"),
        ("mlx-4-g32", _nothing, _config(group_size=-1), "group_size = -1, expected"),
        ("mlx-4-g32", _nothing, _config(group_size=48), "no rows of 4-bit codes in groups of 48"),
        ("mlx-4-g32", _nothing, _config(mode="mxfp5"), "mode = 'mxfp5', expected 'affine' or"),
        ("mlx-4-g32", _nothing, _config(layer={"bits": True}), "layer: bits = True, expected a wh"),
        ("mlx-4-g32", _nothing, _config(layer=False), "has codes, but config leaves it in floats"),
        ("mlx-nvfp4", _add("biases", np.zeros((24, 8), np.float16)), None, "nvfp4 has no biases"),
        ("mlx-nvfp4", _set("scales", 0x7F), None, "scales' holds NaN"),
        ("mlx-nvfp4", _set("scales", 0x81), None, "scales' holds a scale that is negative"),
        ("mlx-mxfp4", _set("scales", 0xFF), None, "scales' holds NaN"),
        ("mlx-mxfp8", _set("weight", 0x7F), None, "weight' holds NaN"),
        ("mlx-mxfp8", _nothing, _config(group_size=16), "group_size = 16, expected 32"),
        ("hqq-4-g32", _set("scale", np.inf), None, "scale' holds a scale that is not finite"),
        ("hqq-4-g32", _remove("zero"), None, "zero' is missing beside the codes"),
        ("hqq-4-g32", _remove("nbits"), None, "nbits' is missing beside the codes"),
        ("hqq-4-g32", _add("nbits", np.array(5, np.int32)), None, "nbits' says '5', expected 8, 4"),
        ("hqq-4-g32", _add("nbits", np.zeros(9, np.int32)), None, "expected one whole number"),
        ("hqq-4-g32", _add("group_size", np.array(0, np.int32)), None, "groups of 0 rows"),
        ("hqq-4-g32", _add("shape", np.array([25, 128])), None, "W_q' is uint8"),
        ("hqq-4-g32", _add("shape", np.array([-1, 128])), None, "shape' says"),
        ("hqq-4-g32", _add("quant_scale", np.array(1, np.uint8)), None, "quant_scale' says '1'"),
        ("hqq-4-g32", _text("packing", b"4bit_u8_b"), None, "packing' says '4bit_u8_b'"),
        ("hqq-3-g64", _cut("W_q"), None, "W_q' is int32"),
        ("torchao-int4-g64-asym", _set("_weight_scale", np.nan), None, "negative or not finite"),
        ("torchao-int4-g64-asym", _set("_weight_qdata", 9), None, "no 4-bit integers"),
        ("torchao-int4-g64-asym", _set("_weight_zero_point", 8), None, "points that are no 4-bit"),
        ("torchao-int4-g64-asym", _remove("_weight_zero_point"), None, "zero_point' is missing"),
        ("torchao-int4-g64-asym", _remove("_weight_qdata"), None, "is without codes"),
        ("torchao-int8", _set("_weight_zero_point", 1), None, "zero points, though"),
        ("torchao-int8", _cut("_weight_scale"), None, "_weight_scale' is float32"),
        ("torchao-int8", _nothing, _said("{"), "not valid JSON"),
        ("torchao-int8", _nothing, _said('{"_type": "Int4Tensor"}'), "_type = 'Int4Tensor'"),
        ("torchao-int8", _nothing, _data(block_size=[0, 128]), "block_size = .*two sizes"),
        ("torchao-int8", _nothing, _data(block_size=[2, 64]), r"expected .* \(12, 2\)"),
        ("torchao-int3", _nothing, _data(target_dtype={"_data": "int5"}), "target_dtype"),
        ("torchao-fp8", _set("_weight_qdata", np.nan), None, "holds NaN"),
        ("torchao-mxfp4", _nothing, _data(is_swizzled_scales=False), "_weight_scale' is float8_e8"),
        ("torchao-mxfp8", _nothing, _data(block_size=16), "block_size = 16, expected 32"),
        ("torchao-nvfp4-whole", _set("_weight_per_tensor_scale", 0), None, "one number above 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, change, metadata, said, tmp_path):
    opened(name, tmp_path / "model")[0].close()
    changed(tmp_path / "model", change, metadata)
    directory = SourceDirectory(tmp_path / "model")
    config = json.loads(directory.metadata_of("decoded")["quantization_config"])
    with directory, pytest.raises(CheckpointError, match=said) as raised:
        codec = CODECS[name.partition("-")[0]](directory, Section(config, "config"))
        for linear in codec.linears().values():
            codec.read(linear)
    assert "\n" not in str(raised.value)
