"""gpt-oss, in floats and as it is published: its experts in MXFP4, decoded as transformers does."""

import shutil

import jax
import numpy as np
import pytest

import fdq
from fdq_checkpoints import CheckpointError, convert, inspect, load
from tests.checkpoints import builders
from tests.models import oracles

PUBLISHED = oracles.ORACLES.parent / "gpt_oss_mxfp4"
SHOWN = 2  # the expert of the last layer that `expected.npz` has
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def published():
    return load(PUBLISHED, dtype="float32"), dict(np.load(PUBLISHED / "expected.npz"))


run = jax.jit(lambda model, tokens: model(tokens))


def halves(gate_up):
    """`[..., 2 I]` gate and up in turns, as they are stored, one after the other."""
    return np.concatenate([gate_up[..., ::2], gate_up[..., 1::2]], axis=-1)


def test_codes_are_those_of_the_file_and_logits_those_of_transformers(published, tmp_path):
    model, expected = published
    experts = model.layers[1].mlp.experts
    stored = builders.tensors_of(PUBLISHED / "model.safetensors")
    for name, wanted in (
        ("gate_up_proj", halves(expected["gate_up_proj"])),
        ("down_proj", expected["down_proj"]),
    ):
        q = getattr(experts, name).kernel.canonical()
        assert (q.spec.format, q.spec.scale_dtype) == ("mxfp4", "float8_e8m0fnu")
        np.testing.assert_array_equal(np.asarray(fdq.dequantize(q))[SHOWN], wanted)
        blocks = stored[f"{EXPERTS}.{name}_blocks"]
        assert q.nbytes == blocks.nbytes + blocks.nbytes // 16
    others = (model.layers[1].self_attn.qkv_proj.kernel, model.layers[1].mlp.router.kernel)
    assert not any(isinstance(kernel, fdq.QTensor) for kernel in others)
    logits = run(model, expected["ids"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    convert(PUBLISHED, tmp_path / "out", None, dtype="float32")
    np.testing.assert_array_equal(run(fdq.load(tmp_path / "out"), expected["ids"]), logits)


def test_another_scheme_is_made_of_what_the_codes_say(published):
    model, _ = published
    again = load(PUBLISHED, "W8A16C8-g32", dtype="float32")
    for name in ("gate_up_proj", "down_proj"):
        one, other = (getattr(m.layers[0].mlp.experts, name).kernel for m in (again, model))
        assert one.spec.format == "int8"
        decoded = np.asarray(fdq.dequantize(other.canonical()))
        error = np.abs(np.asarray(fdq.dequantize(one.canonical())) - decoded)
        assert error.max() < np.abs(decoded).max() / 200


def test_stacks_in_floats_are_quantized_as_the_model_is(tmp_path):
    model, _ = oracles.oracle("gpt_oss")
    loaded, wanted = load(builders.MODELS / "gpt_oss", "W8A16"), fdq.quantize(model, "W8A16")
    for name in ("gate_up_proj", "down_proj"):
        one, other = (getattr(m.layers[1].mlp.experts, name) for m in (loaded, wanted))
        np.testing.assert_array_equal(one.kernel.canonical().codes, other.kernel.canonical().codes)
        np.testing.assert_array_equal(one.bias[...], other.bias[...])


def test_inspect_names_the_tool_and_its_bits():
    table = inspect(PUBLISHED)
    assert table.kind == "model quantized by another tool"
    assert table.quantized_bits_per_weight == 4.25
    assert "MXFP4, 4 bits" in str(table)


def _no_number(tensors):
    scales = f"{EXPERTS}.down_proj_scales"
    tensors[scales] = tensors[scales].copy()
    tensors[scales][1, 3, 0] = 255


def _no_scales(tensors):
    del tensors[f"{EXPERTS}.down_proj_scales"]


def _short(tensors):
    tensors[f"{EXPERTS}.down_proj_blocks"] = tensors[f"{EXPERTS}.down_proj_blocks"][..., :8]


def _narrow(tensors):
    for end in ("blocks", "scales"):
        tensors[f"{EXPERTS}.down_proj_{end}"] = tensors[f"{EXPERTS}.down_proj_{end}"][:, :32]


def _twice(tensors):
    tensors[f"{EXPERTS}.down_proj"] = np.zeros((4, 64, 64), np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_no_number, "down_proj_scales' holds NaN"),
        (_no_scales, "down_proj_scales' is missing beside the codes"),
        (_short, r"\(4, 64, 2, 8\) is not \[experts, out, in / 32, 16\]"),
        (_narrow, r"down_proj' has shape \(4, 64, 32\), expected \(4, 64, 64\) from config.json"),
        (_twice, "down_proj is beside the codes of the same layer"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, said, tmp_path):
    shutil.copytree(PUBLISHED, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = builders.tensors_of(file)
    change(tensors)
    builders.write(file, {name: np.ascontiguousarray(a) for name, a in tensors.items()})
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "model")


def test_experts_that_the_config_leaves_in_floats_have_no_codes(tmp_path):
    shutil.copytree(PUBLISHED, tmp_path / "model")
    content = {"quant_method": "mxfp4", "modules_to_not_convert": [EXPERTS]}
    builders.edit_config(tmp_path / "model", quantization_config=content)
    with pytest.raises(CheckpointError, match="has codes, but config.json leaves it in floats"):
        load(tmp_path / "model")
