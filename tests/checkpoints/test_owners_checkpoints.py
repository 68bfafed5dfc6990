"""Checkpoints that other tools' own code saved, and what that code decodes them to."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fdq
from fdq_checkpoints import load
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources.codec import Section
from fdq_checkpoints.sources.fastdeploy import FastDeploy
from fdq_checkpoints.sources.quantized_model import CODECS
from tests.checkpoints import builders, foreign
from tests.covering import slow_but
from tests.formats.oracles import array, fixture

OWNED = builders.MODELS.parent / "quantized"


@pytest.mark.parametrize(
    "name",
    slow_but(
        {"w4", "fp8_block", "nf4", "mlx4", "torchao_int4"},
        sorted(folder.name for folder in OWNED.iterdir()),
    ),
)
def test_checkpoints_that_their_owners_code_saved(name):
    """Weights to the last bit but one, and the logits that transformers has with them."""
    folder, expected = OWNED / name, np.load(OWNED / name / "expected.npz")
    model = load(folder)
    k = model.layers[0].self_attn.qkv_proj.kernel
    down = model.layers[1].mlp.down_proj.kernel
    floats = [
        fdq.dequantize(w.canonical()) if isinstance(w, fdq.QTensor) else w[...] for w in (k, down)
    ]
    q_width, k_width = 64, 32
    found = {
        "model.layers.0.self_attn.k_proj": floats[0][:, q_width : q_width + k_width],
        "model.layers.1.mlp.down_proj": floats[1],
    }
    for path, weight in found.items():
        # Its owner's code decodes NVFP4 to bfloat16.
        rounding = 2.0**-8 if name == "nvfp4" else 3e-7
        # HQQ subtracts its zero point before it multiplies.
        least = 2e-8 if name == "hqq4" else 1e-9
        np.testing.assert_allclose(weight.T, expected[path], rtol=rounding, atol=least)
    for layer in model.layers:  # what inputs are rounded to is not what is compared
        for linear in (*vars(layer.self_attn).values(), *vars(layer.mlp).values()):
            if hasattr(linear, "activation"):
                linear.activation = linear.activation_scale = None
    tokens = jnp.asarray(expected["ids"], jnp.int32)
    tolerance = 1e-2 if name == "nvfp4" else 3e-6
    np.testing.assert_allclose(model(tokens), expected["logits"], atol=tolerance)


# What their owners' code made of the same arrays, one layer each.
OWNERS = {
    "gptq/b4_g32": ({"bits": 4, "group_size": 32}, "gptq"),
    "gptq/b3_g32": ({"bits": 3, "group_size": 32}, "gptq"),
    "gptq/b8_channel": ({"bits": 8, "group_size": -1}, "gptq"),
    "gptq/b4_g32_desc_act": ({"bits": 4, "group_size": 32, "desc_act": True}, "gptq"),
    "gptq/b2_g32_asym_v2": (
        {"bits": 2, "group_size": 32, "desc_act": True, "sym": False, "format": "gptq_v2"},
        "gptq",
    ),
    **{
        f"gptq/b{bits}_g32{'' if symmetric else '_asym'}_order": (
            {
                "bits": bits,
                "group_size": 32,
                "desc_act": True,
                "sym": symmetric,
                "checkpoint_format": "gptq" if symmetric else "gptq_v2",
            },
            "gptq",
        )
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    },
    "gptq/b4_g64_asym_v2": (
        {"bits": 4, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
        "gptq",
    ),
    "checkpoints/awq": ({"bits": 4, "group_size": 32}, "awq"),
    "checkpoints/hf_fp8": ({"weight_block_size": [128, 128]}, "fp8"),
    "checkpoints/modelopt_nvfp4": ({"quant_algo": "NVFP4"}, "modelopt"),
    "compressed_tensors/normal/int4_g128": (("pack-quantized", 4, "group"), "compressed-tensors"),
    "compressed_tensors/student/int4_g128_asym": (
        ("pack-quantized", 4, "group", False),
        "compressed-tensors",
    ),
    "compressed_tensors/odd/int4_channel_asym": (
        ("pack-quantized", 4, "channel", False),
        "compressed-tensors",
    ),
    "compressed_tensors/odd/int8_channel": (("int-quantized", 8, "channel"), "compressed-tensors"),
    "compressed_tensors/odd/fp8_channel": (("float-quantized", 8, "channel"), "compressed-tensors"),
    "compressed_tensors/odd/fp8_block": (("float-quantized", 8, "block"), "compressed-tensors"),
    "compressed_tensors/student/fp8_tensor": (
        ("float-quantized", 8, "tensor"),
        "compressed-tensors",
    ),
    "compressed_tensors/normal/nvfp4": (("nvfp4-pack-quantized", 4, "group"), "compressed-tensors"),
    "compressed_tensors/normal/mxfp4": (("mxfp4-pack-quantized", 4, "group"), "compressed-tensors"),
    "compressed_tensors/normal/mxfp8": (("mxfp8-quantized", 8, "group"), "compressed-tensors"),
}


@pytest.mark.parametrize("key", OWNERS)
def test_owners_code_decodes_the_same(key, tmp_path):
    """Codes are exact; a product may be rounded once more than by the owner."""
    said, method = OWNERS[key]
    file, _, prefix = key.partition("/")
    arrays = fixture(file, prefix)
    decoded = arrays.pop("decoded")
    arrays.pop("codes", None)
    if isinstance(said, tuple):
        format, bits, strategy, *symmetric = said
        weights = {"num_bits": bits, "strategy": strategy, "group_size": 128,
                   "block_structure": [128, 128], "symmetric": not symmetric,
                   "type": "int" if "int" in key else "float"}  # fmt: skip
        said = foreign.of_groups(format, weights)
    tensors = {}
    for name, value in arrays.items():
        is_float8 = value.dtype == np.uint8 and (
            (name == "weight" and "fp8" in key) or (name == "weight_scale" and "nvfp4" in key)
        )
        tensors[f"layer.{name}"] = value.view(ml_dtypes.float8_e4m3fn) if is_float8 else value
    builders.model("llama", tmp_path / "model")
    builders.write(tmp_path / "model/model.safetensors", tensors)
    with SourceDirectory(tmp_path / "model") as directory:
        codec = CODECS[method](directory, Section({"quant_method": method} | said, "config"))
        (linear,) = codec.linears().values()
        q = codec.read(linear).qtensor()
    found = np.asarray(fdq.dequantize(q))
    # GPTQ's fixtures are [in, out] as its own layers hold them.
    decoded = decoded if file == "gptq" else decoded.T
    assert found.shape == decoded.shape
    tolerance = 1e-3 if file == "gptq" else 2e-7  # its library multiplies in float16
    np.testing.assert_allclose(
        found, decoded, rtol=tolerance, atol=tolerance * np.abs(decoded).max()
    )


def test_every_owner_is_in_the_fixtures():
    assert array("gptq", "b4_g32/codes").dtype == np.uint8
    methods = {method for _, method in OWNERS.values()}
    of_fastdeploy = set(FastDeploy.methods)  # by Paddle's bytes, in a file of their own
    others = {"bitsandbytes", "fbgemm_fp8", "auto-round", "nvfp4", "modelopt_fp4", "mxfp4"}
    elsewhere = {"mlx", "hqq", "torchao", "gemma"}  # test_quantized_layers.py, and whole models
    assert methods | others | elsewhere | of_fastdeploy == set(CODECS)
