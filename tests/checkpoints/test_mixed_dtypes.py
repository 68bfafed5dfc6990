"""Parts of one kernel in several dtypes: each value as its file has it until the model's dtype."""

import ml_dtypes
import numpy as np
import pytest

from fdq_checkpoints import CheckpointError, load
from tests.checkpoints import builders
from tests.checkpoints.test_names import leaves

BF16, F16, F32, F64 = map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."


def stored(folder, family, dtypes):
    """An oracle model whose tensors are stored in `dtypes`, by the end of their names; as float64.

    All others are float32 with digits that 16 bits do not hold.
    """
    tensors = builders.model(family, folder)
    rng = np.random.default_rng(1)
    result = {}
    for name, array in tensors.items():
        found = next((dtype for end, dtype in dtypes.items() if name.endswith(end)), F32)
        result[name] = rng.normal(size=array.shape).astype(found)
    builders.write(folder / "model.safetensors", result)
    return {name: array.astype(np.float64) for name, array in result.items()}


def fused(tensors, *names):
    return np.concatenate([tensors[f"{name}.weight"].T for name in names], axis=1)


@pytest.mark.parametrize("first", [BF16, F16, F64], ids=str)
def test_parts_in_other_dtypes_than_the_first_are_not_rounded_to_it(tmp_path, first):
    dtypes = {"q_proj.weight": first, "gate_proj.weight": first}
    tensors = stored(tmp_path / "model", "llama", dtypes)
    found = leaves(load(tmp_path / "model", dtype="float32"))
    qkv = fused(tensors, *(f"{ATTENTION}{x}_proj" for x in "qkv"))
    gate_up = fused(tensors, f"{MLP}gate_proj", f"{MLP}up_proj")
    for name, expected in (("self_attn.qkv_proj", qkv), ("mlp.gate_up_proj", gate_up)):
        kernel = found[f"layers.0.{name}.kernel"]
        assert kernel.dtype == F32
        np.testing.assert_array_equal(kernel, expected.astype(F32))


def test_two_dtypes_of_16_bits_meet_in_one_that_holds_both(tmp_path):
    tensors = stored(tmp_path / "model", "llama", {"q_proj.weight": BF16, "k_proj.weight": F16})
    expected = fused(tensors, *(f"{ATTENTION}{x}_proj" for x in "qkv"))
    for dtype in (F32, BF16):
        found = leaves(load(tmp_path / "model", dtype=dtype.name))
        kernel = found["layers.0.self_attn.qkv_proj.kernel"]
        np.testing.assert_array_equal(kernel, expected.astype(F32).astype(dtype))


def test_experts_in_other_dtypes_than_the_first_are_not_rounded_to_it(tmp_path):
    dtypes = {"experts.0.gate_proj.weight": BF16, "experts.0.down_proj.weight": F16}
    tensors = stored(tmp_path / "model", "qwen3_moe", dtypes)
    found = leaves(load(tmp_path / "model", dtype="float32"))
    experts = found["layers.0.mlp.experts.down_proj.kernel"]
    for index, kernel in enumerate(experts):
        expected = fused(tensors, f"{MLP}experts.{index}.down_proj")
        np.testing.assert_array_equal(kernel, expected.astype(F32))
        both = (f"{MLP}experts.{index}.{part}_proj" for part in ("gate", "up"))
        kernel = found["layers.0.mlp.experts.gate_up_proj.kernel"][index]
        np.testing.assert_array_equal(kernel, fused(tensors, *both).astype(F32))


def test_what_a_dtype_cannot_hold_is_named_with_its_value(tmp_path):
    tensors = builders.model("llama", tmp_path / "model")
    large = tensors[f"{ATTENTION}v_proj.weight"].copy()
    large[1, 2] = 1e5
    tensors |= {f"{ATTENTION}v_proj.weight": large}
    tensors[f"{ATTENTION}q_proj.weight"] = tensors[f"{ATTENTION}q_proj.weight"].astype(F16)
    builders.write(tmp_path / "model" / "model.safetensors", tensors)
    for dtype in ("float32", "bfloat16"):
        kernel = leaves(load(tmp_path / "model", dtype=dtype))["layers.0.self_attn.qkv_proj.kernel"]
        assert float(kernel.max()) == np.asarray(1e5, kernel.dtype)
    message = r"qkv_proj\.kernel: 100000\.0 at \[2, \d+\] is beyond the range of float16"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model", dtype="float16")
    # The same at the end of the others' range, which bfloat16 and float32 do not quite share.
    for value, stored_as, dtype in ((3.4e38, F32, "bfloat16"), (1e39, F64, "float32")):
        norm = np.full(tensors["model.norm.weight"].shape, value, stored_as)
        builders.write(
            tmp_path / "model" / "model.safetensors", tensors | {"model.norm.weight": norm}
        )
        with pytest.raises(CheckpointError, match=rf"norm\.scale: .* at \[0\] is .* of {dtype}"):
            load(tmp_path / "model", dtype=dtype)
    kernel = tensors[f"{MLP}down_proj.weight"].astype(F64)
    kernel[0, 0] = 1e39
    builders.write(
        tmp_path / "model" / "model.safetensors", tensors | {f"{MLP}down_proj.weight": kernel}
    )
    with pytest.raises(CheckpointError, match=r"down_proj\.kernel: 1e\+39 at \[0, 0\] is beyond"):
        load(tmp_path / "model", "W8A16")


def test_a_tied_head_in_another_dtype_is_compared_by_value(tmp_path):
    tensors = builders.model("qwen3", tmp_path / "model")
    embedding = tensors["model.embed_tokens.weight"].astype(BF16)
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.astype(F32)}
    builders.write(tmp_path / "model" / "model.safetensors", tensors)
    assert load(tmp_path / "model").lm_head is None
    tensors["lm_head.weight"][3, 4] *= 1.001
    builders.write(tmp_path / "model" / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="differs from 'model.embed_tokens.weight'"):
        load(tmp_path / "model")
