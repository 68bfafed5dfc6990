"""Checkpoints that other tools quantized: named with their bits, and with what fdq can do."""

import json

import ml_dtypes
import numpy as np
import pytest

from fdq.schemes.scheme import Scheme
from fdq_checkpoints import CheckpointError, convert, inspect, load
from tests.checkpoints import builders
from tests.cli.command import run

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
FLOATS = WEIGHTS | {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
RELEASES = {
    # quantization_config: what is said of it, the scheme that is like it
    "gptq": ({"bits": 4, "group_size": 128}, "GPTQ, 4 bits in groups of 128", "W4A16-g128"),
    "gptq, 3 bits": (
        {"quant_method": "gptq", "bits": 3, "group_size": -1},
        "GPTQ, 3 bits",
        "W3A16",
    ),
    "awq": ({"bits": 4, "group_size": 64}, "AWQ, 4 bits in groups of 64", "W4A16-g64"),
    "awq, old keys": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128},
        "AWQ, 4 bits in groups of 128",
        "W4A16-g128",
    ),
    "auto-round": ({"bits": 2, "group_size": 32}, "AutoRound, 2 bits in groups of 32", "W2A16-g32"),
    "compressed-tensors": (
        {"config_groups": {"group_0": {"weights": WEIGHTS}}, "format": "pack-quantized"},
        "compressed-tensors, 4 bits in groups of 128",
        "W4A16-g128",
    ),
    "compressed-tensors, fp8": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": FLOATS}},
            "format": "float-quantized",
        },
        "compressed-tensors, 8 bits (fp8)",
        "Wfp8A16",
    ),
    "bitsandbytes": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes, 4 bits (nf4)",
        "WNF4A16",
    ),
    "bitsandbytes, 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
        "bitsandbytes, 8 bits",
        "W8A16",
    ),
    "fp8": ({"fmt": "e4m3", "weight_block_size": [128, 128]}, "FP8, 8 bits", "Wfp8A16"),
    "mxfp4": ({}, "MXFP4, 4 bits", "WMXFP4A16"),
    "modelopt": ({"quant_algo": "NVFP4"}, "ModelOpt, 4 bits (nvfp4)", "WNVFP4A16"),
    "hqq": ({"nbits": 5}, "HQQ, 5 bits", None),
    "hqq, as saved": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
        "HQQ, 4 bits",
        "W4A16",
    ),
    "torchao": (
        {"quant_type": {"default": {"_data": {"weight_dtype": {"_data": "int4"}}}}},
        "torchao, 4 bits",
        "W4A16",
    ),
    "torchao, float8": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}},
        "torchao, 8 bits (fp8)",
        "Wfp8A16",
    ),
    "fastdeploy": ({"quantization": "wint4", "quant_method": ...}, "FastDeploy WINT4, 4", "W4A16"),
    "of tomorrow": ({"bits": "four", "config_groups": 3}, "'of tomorrow', bits unknown", None),
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_named_with_its_bits_and_the_scheme_that_is_like_it(tmp_path, name):
    content, said, scheme = RELEASES[name]
    builders.model("llama", tmp_path / "model")
    content = {"quant_method": name} | content
    content = {key: value for key, value in content.items() if value is not ...}
    builders.edit_config(tmp_path / "model", quantization_config=content)
    table = inspect(tmp_path / "model")
    assert table.kind == "model quantized by another tool"
    assert table.scheme is not None and table.scheme.startswith(said)
    assert said in str(table) and "not quantized" not in str(table)
    assert table.advice is not None and "float original" in table.advice
    assert (f"--scheme {scheme} " in table.advice) == (scheme is not None)
    if scheme is not None:
        assert Scheme.parse(scheme).weight is not None
    for use in (load, lambda path: convert(path, tmp_path / "out", "W8A16")):
        with pytest.raises(CheckpointError, match="quantized already: .* the float original"):
            use(tmp_path / "model")


@pytest.mark.parametrize("side", ["quantize_config.json", "hf_quant_config.json"])
def test_a_file_beside_the_config_says_it_too(tmp_path, side):
    builders.model("llama", tmp_path / "model")
    content = {"bits": 4, "group_size": 128}
    if side.startswith("hf"):
        content = {"quantization": {"quant_algo": "FP8"}}
    (tmp_path / "model" / side).write_text(json.dumps(content))
    expected = "ModelOpt, 8 bits (fp8)" if side.startswith("hf") else "GPTQ, 4 bits in groups of"
    assert str(inspect(tmp_path / "model").scheme).startswith(expected)
    with pytest.raises(CheckpointError, match=side):
        load(tmp_path / "model")


def packed_gptq(k, n, group):
    return {
        "qweight": np.zeros((k // 8, n), np.int32),
        "qzeros": np.zeros((k // group, n // 8), np.int32),
        "scales": np.zeros((k // group, n), np.float16),
    }


def packed_bitsandbytes(k, n, group):
    return {
        "weight": np.zeros((k * n // 2, 1), np.uint8),
        "weight.absmax": np.zeros(k * n // group, np.float32),
        "weight.quant_map": np.zeros(16, np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8),
    }


def packed_fp8(k, n, group):
    return {
        "weight": np.zeros((n, k), ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.zeros((1, 1), np.float32),
    }


@pytest.mark.parametrize(
    ("method", "pack", "bits"),
    [
        ("gptq", packed_gptq, 4 + 4 / 32 + 16 / 32),
        ("bitsandbytes", packed_bitsandbytes, 4 + 32 / 32 + (16 * 32 + 80 * 8) / (64 * 96)),
        ("fp8", packed_fp8, 8 + 32 / (64 * 96)),
    ],
)
def test_bits_per_weight_count_weights_and_not_words(tmp_path, method, pack, bits):
    k, n, group = 64, 96, 32
    tensors = builders.model("llama", tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj"
    del tensors[f"{name}.weight"]
    floats = sum(array.size for array in tensors.values())
    tensors |= {f"{name}.{end}": array for end, array in pack(k, n, group).items()}
    builders.write(tmp_path / "model" / "model.safetensors", tensors)
    content = {"quant_method": method, "bits": 4, "group_size": group, "load_in_4bit": True}
    if method == "fp8":
        content = {"quant_method": method}
    builders.edit_config(tmp_path / "model", quantization_config=content)
    table = inspect(tmp_path / "model")
    assert table.quantized_bits_per_weight == pytest.approx(bits)
    assert table.size == floats + k * n


def test_the_command_says_what_can_be_done(tmp_path):
    builders.model("llama", tmp_path / "model")
    content = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    builders.edit_config(tmp_path / "model", quantization_config=content)
    result = run("inspect", tmp_path / "model")
    assert "GPTQ, 4 bits in groups of 128" in result.stdout
    assert "Load or convert the float original" in result.stderr
    table = json.loads(run("inspect", tmp_path / "model", "--json").stdout)
    assert table["scheme"] == "GPTQ, 4 bits in groups of 128" and "W4A16" in table["advice"]
