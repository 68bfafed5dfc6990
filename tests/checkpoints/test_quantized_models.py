"""Models that other tools quantized: loaded as they are, bit for bit, and decoded like theirs."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fdq
from fdq_checkpoints import CheckpointError, convert, inspect, load
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import bitsandbytes
from fdq_checkpoints.sources.codec import Section
from fdq_checkpoints.sources.fastdeploy import FastDeploy
from fdq_checkpoints.sources.quantized_model import CODECS
from tests.checkpoints import builders, foreign
from tests.covering import slow, slow_but
from tests.formats.oracles import array, fixture


def float_twin(decoded, folder, base):
    """The same model in floats."""
    builders.model(base, folder)
    builders.edit_config(folder, **foreign.WIDTHS[base])
    stored = {name: np.ascontiguousarray(array) for name, array in decoded.items()}
    builders.write(folder / "model.safetensors", stored)
    return load(folder)


DEFAULT = {
    *("gptq, desc_act", "awq", "packed, asymmetric"),
    *("float8, blocks", "nf4"),
}


@pytest.mark.parametrize("kind", slow_but(DEFAULT, foreign.CONFIGS))
def test_weights_are_what_their_owners_say(kind, tmp_path, rng):
    decoded = foreign.model(kind, tmp_path / "model", rng)
    model, twin = load(tmp_path / "model"), float_twin(decoded, tmp_path / "twin", "llama")
    for one, other in zip(model.layers, twin.layers, strict=True):
        for path in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            mine, theirs = one, other
            for name in path.split("."):
                mine, theirs = getattr(mine, name), getattr(theirs, name)
            q, wanted = mine.kernel, np.asarray(theirs.kernel[...])
            assert isinstance(q, fdq.QTensor) == (kind != "modelopt awq, factors")
            found = fdq.dequantize(q.canonical()) if isinstance(q, fdq.QTensor) else q[...]
            # Where an offset is added, what cancels keeps the rounding of the product.
            has_offset = isinstance(q, fdq.QTensor) and q.spec.zero_point == "offset"
            least = 2e-8 if has_offset else 0
            np.testing.assert_allclose(np.asarray(found), wanted, rtol=2e-7, atol=least)
    tokens = jnp.array([[1, 5, 9, 2, 8]])
    if model.layers[0].mlp.down_proj.activation is None and kind in DEFAULT:
        np.testing.assert_allclose(model(tokens), twin(tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [slow("gptq"), "fine-grained float8"])
def test_experts_are_stacked(kind, tmp_path, rng):
    decoded = foreign.model(kind, tmp_path / "model", rng, "qwen3_moe")
    model, twin = load(tmp_path / "model"), float_twin(decoded, tmp_path / "twin", "qwen3_moe")
    tokens = jnp.array([[1, 5, 9, 2, 8]])
    experts = model.layers[0].mlp.experts.down_proj
    assert isinstance(experts.kernel, fdq.QTensor)
    wanted = twin.layers[0].mlp.experts.down_proj.kernel[...]
    np.testing.assert_allclose(fdq.dequantize(experts.kernel.canonical()), wanted, rtol=2e-7)
    if experts.activation is None:
        np.testing.assert_allclose(model(tokens), twin(tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_a_conversion_keeps_them_and_another_scheme_is_made_of_their_values(kind, tmp_path, rng):
    decoded = foreign.model(kind, tmp_path / "model", rng)
    table = convert(tmp_path / "model", tmp_path / "kept", None)
    kept, model = load(tmp_path / "kept"), load(tmp_path / "model")
    for mine, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(model), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert kept.layers[0].mlp.down_proj.activation == model.layers[0].mlp.down_proj.activation
    assert "W4" in str(table.scheme) or "W8" in str(table.scheme)
    again = load(tmp_path / "model", "W8A16")
    twin = float_twin(decoded, tmp_path / "twin", "llama")
    wanted = fdq.quantize(twin, "W8A16").layers[0].mlp.down_proj.kernel.canonical()
    found = again.layers[0].mlp.down_proj.kernel.canonical()
    np.testing.assert_array_equal(found.codes, wanted.codes)


@pytest.mark.parametrize("kind", ["gptq", "float8"])
def test_inspect_says_what_it_is_and_what_to_do(kind, tmp_path, rng):
    foreign.model(kind, tmp_path / "model", rng)
    table = inspect(tmp_path / "model")
    assert table.kind == "model quantized by another tool"
    assert table.scheme.startswith("GPTQ, 4 bits" if kind == "gptq" else "compressed-tensors, 8")
    assert "fdq.load(DIR)" in table.advice
    assert any(row.format.startswith("W4" if kind == "gptq" else "Wfp8") for row in table.rows)


def stacked_by_mlx(folder):
    """Experts as MLX holds them: one tensor each for gate, up and down of all."""
    path = folder / "model.safetensors"
    tensors = {name: np.array(a) for name, a in builders.tensors_of(path).items()}
    for name in [n for n in tensors if ".experts.0." in n]:
        count = sum(re.sub(r"experts\.\d+", "experts.0", n) == name for n in tensors)
        parts = [tensors.pop(name.replace("experts.0", f"experts.{e}")) for e in range(count)]
        tensors[name.replace("experts.0", "switch_mlp")] = np.stack(parts)
    builders.write(path, tensors)


@pytest.mark.parametrize("kind", [slow("mlx"), slow("mlx, nvfp4")])
def test_experts_of_mlx_are_one_tensor(kind, tmp_path, rng):
    decoded = foreign.model(kind, tmp_path / "model", rng, "qwen3_moe")
    stacked_by_mlx(tmp_path / "model")
    model, twin = load(tmp_path / "model"), float_twin(decoded, tmp_path / "twin", "qwen3_moe")
    for name in ("gate_up_proj", "down_proj"):
        found = getattr(model.layers[0].mlp.experts, name).kernel
        wanted = getattr(twin.layers[0].mlp.experts, name).kernel[...]
        assert isinstance(found, fdq.QTensor)
        np.testing.assert_allclose(fdq.dequantize(found.canonical()), wanted, rtol=2e-7, atol=2e-8)
    tokens = jnp.array([[1, 5, 9, 2, 8]])
    np.testing.assert_allclose(model(tokens), twin(tokens), atol=2e-4, rtol=1e-4)


def test_an_embedding_of_mlx_is_decoded_and_modules_have_settings_of_their_own(
    tmp_path, rng, caplog
):
    decoded = foreign.model("mlx", tmp_path / "model", rng)
    down = "model.layers.1.mlp.down_proj"

    def change(tensors):
        for module, bits, group in ((down, 8, 64), ("model.embed_tokens", 2, 64)):
            shape = decoded[f"{module}.weight"].shape
            codes, weight = foreign.mlx(rng, *shape, bits=bits, group=group)
            tensors.update({f"{module}.{end}": array for end, array in codes.items()})
            decoded[f"{module}.weight"] = weight.astype(np.float32).T

    changed(tmp_path / "model", change)
    said = {"bits": 4, "group_size": 32, down: {"bits": 8, "group_size": 64}}
    said |= {"model.embed_tokens": {"bits": 2}, "lm_head": False}  # groups are 64 by default
    builders.edit_config(tmp_path / "model", quantization=said, quantization_config=...)
    model, twin = load(tmp_path / "model"), float_twin(decoded, tmp_path / "twin", "llama")
    assert "embed_tokens.embedding has codes, which fdq holds in floats" in caplog.text
    assert str(model.layers[1].mlp.down_proj.kernel.spec) == "W8-g64-affine"
    assert str(model.layers[0].mlp.down_proj.kernel.spec) == "W4-g32-affine"
    tokens = jnp.array([[1, 5, 9, 2, 8]])
    np.testing.assert_allclose(model(tokens), twin(tokens), atol=2e-4, rtol=1e-4)
    convert(tmp_path / "model", tmp_path / "kept", None)
    kept = load(tmp_path / "kept")
    for mine, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: np.array(a) for name, a in builders.tensors_of(path).items()}
    change(tensors)
    builders.write(path, tensors)


def test_biases_of_zeros_that_no_layer_has_are_let_through(tmp_path, rng):
    """AutoGPTQ writes one for every layer."""
    foreign.model("gptq", tmp_path / "model", rng)

    def add(tensors):
        for name in [n for n in tensors if n.endswith(".qweight")]:
            width = tensors[name].shape[1]
            tensors[name.replace("qweight", "bias")] = np.zeros(width, np.float16)

    changed(tmp_path / "model", add)
    assert isinstance(load(tmp_path / "model").layers[0].mlp.down_proj.kernel, fdq.QTensor)


def test_codes_of_a_router_and_of_an_embedding_are_decoded(tmp_path, rng):
    """Rows of the one are looked up, the other is computed in float32."""
    decoded = foreign.model("llm.int8", tmp_path / "model", rng, "qwen3_moe")
    gate = "model.layers.0.mlp.gate"

    def add(tensors):
        for module in (gate, "model.embed_tokens"):
            shape = tensors.pop(f"{module}.weight").shape
            codes, weight = foreign.eight_bits(rng, *shape)
            tensors.update({f"{module}.{end}": array for end, array in codes.items()})
            decoded[f"{module}.weight"] = weight.astype(np.float32).T

    changed(tmp_path / "model", add)
    model, twin = load(tmp_path / "model"), float_twin(decoded, tmp_path / "twin", "qwen3_moe")
    np.testing.assert_allclose(
        model.embed_tokens.embedding[...], decoded["model.embed_tokens.weight"], rtol=1e-6
    )
    tokens = jnp.array([[1, 5, 9, 2, 8]])
    np.testing.assert_allclose(model(tokens), twin(tokens), atol=1e-3, rtol=1e-3)


def test_a_model_of_which_no_layer_keeps_its_codes_is_one_of_floats(tmp_path, rng):
    decoded = foreign.model("gptq", tmp_path / "model", rng)

    def only_v(tensors):
        for name in list(tensors):
            module, _, end = name.rpartition(".")
            if end == "qweight" and not module.endswith("v_proj"):
                for other in [n for n in tensors if n.startswith(module + ".")]:
                    del tensors[other]
                tensors[f"{module}.weight"] = np.ascontiguousarray(decoded[f"{module}.weight"])

    changed(tmp_path / "model", only_v)
    model, twin = load(tmp_path / "model"), float_twin(decoded, tmp_path / "twin", "llama")
    tokens = jnp.array([[1, 5, 9]])
    np.testing.assert_allclose(model(tokens), twin(tokens), atol=2e-4, rtol=1e-4)


def test_an_expert_that_calibration_never_reached_has_no_scale_of_its_input(tmp_path, rng):
    foreign.model("modelopt fp8, static", tmp_path / "model", rng, "qwen3_moe")
    path = "model.layers.0.mlp.experts"

    def drop(tensors):
        for part in ("gate", "up", "down"):
            del tensors[f"{path}.0.{part}_proj.input_scale"]

    changed(tmp_path / "model", drop)
    stored = builders.tensors_of(tmp_path / "model/model.safetensors")
    model = load(tmp_path / "model")
    widest = max(stored[f"{path}.{expert}.down_proj.input_scale"].item() for expert in range(1, 8))
    down = model.layers[0].mlp.experts.down_proj
    assert not down.activation.dynamic
    assert down.activation_scale[...] == np.float32(widest)


@pytest.mark.parametrize("kind", ["int8, static", "float8, static", "modelopt fp8, static"])
def test_static_scales_of_inputs_are_the_widest_of_a_fused_layer(kind, tmp_path, rng):
    foreign.model(kind, tmp_path / "model", rng)
    stored = builders.tensors_of(tmp_path / "model/model.safetensors")
    model = load(tmp_path / "model")
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}.self_attn"
        parts = [stored[f"{prefix}.{name}_proj.input_scale"].item() for name in "qkv"]
        for linear, wanted in (
            (layer.self_attn.qkv_proj, max(parts)),
            (layer.self_attn.o_proj, stored[f"{prefix}.o_proj.input_scale"].item()),
        ):
            assert not linear.activation.dynamic
            assert linear.activation_scale[...] == np.float32(wanted)
    assert np.isfinite(model(jnp.array([[1, 5, 9]]))).all()
    convert(tmp_path / "model", tmp_path / "kept", None)
    kept = load(tmp_path / "kept")
    for mine, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_parts_that_one_layer_cannot_hold_are_decoded_and_named(tmp_path, rng, caplog):
    decoded = foreign.model("packed", tmp_path / "model", rng)
    stored = builders.tensors_of(tmp_path / "model/model.safetensors")
    module = "model.layers.0.self_attn.v_proj"
    stored = {n: a for n, a in stored.items() if not n.startswith(module)}
    stored[f"{module}.weight"] = np.ascontiguousarray(decoded[f"{module}.weight"])
    builders.write(tmp_path / "model/model.safetensors", stored)
    model, twin = load(tmp_path / "model"), float_twin(decoded, tmp_path / "twin", "llama")
    assert "layers.0.self_attn.qkv_proj.kernel is stored in different ways" in caplog.text
    assert not isinstance(model.layers[0].self_attn.qkv_proj.kernel, fdq.QTensor)
    tokens = jnp.array([[1, 5, 9]])
    np.testing.assert_allclose(model(tokens), twin(tokens), atol=2e-4, rtol=1e-4)


def _other_order(tensors):
    """v alone has its rows in another order."""
    name = "model.layers.0.self_attn.v_proj.g_idx"
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])


def test_rows_in_an_order_stay_in_it_and_parts_share_one(tmp_path, rng, caplog):
    decoded = foreign.model("gptq, desc_act", tmp_path / "model", rng)
    model, index = load(tmp_path / "model"), foreign.order_of(64, 32)
    q = model.layers[0].self_attn.qkv_proj.kernel.canonical()
    assert str(q.spec) == "W4-g32-f16-rows"
    np.testing.assert_array_equal(q.row_order, np.argsort(index, kind="stable"))
    table = convert(tmp_path / "model", tmp_path / "kept", None)
    assert "-rows" in str(table.scheme)
    kept = load(tmp_path / "kept")
    for mine, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not caplog.text
    changed(tmp_path / "model", _other_order)
    model = load(tmp_path / "model")
    assert "layers.0.self_attn.qkv_proj.kernel is stored in different ways" in caplog.text
    kernel = model.layers[0].self_attn.qkv_proj.kernel
    assert not isinstance(kernel, fdq.QTensor)
    k = decoded["model.layers.0.self_attn.k_proj.weight"]
    np.testing.assert_allclose(kernel[...][:, 64 : 64 + len(k)], k.T, rtol=2e-7)


def test_experts_may_be_in_order_or_not(tmp_path, rng):
    decoded = foreign.model("gptq, desc_act", tmp_path / "model", rng, "qwen3_moe")
    name = "model.layers.0.mlp.experts.{}.{}_proj"

    def in_order(tensors):
        for part in ("gate", "up"):
            module = name.format(1, part)
            tensors[f"{module}.g_idx"] = np.sort(tensors[f"{module}.g_idx"])

    changed(tmp_path / "model", in_order)
    q = load(tmp_path / "model").layers[0].mlp.experts.gate_up_proj.kernel.canonical()
    np.testing.assert_array_equal(q.row_order[1], np.arange(64))
    gate = decoded[f"{name.format(2, 'gate')}.weight"]
    np.testing.assert_allclose(fdq.dequantize(q[2])[:, : len(gate)], gate.T, rtol=2e-7)


def test_layers_of_one_model_may_be_of_several_algorithms(tmp_path, rng):
    foreign.model("modelopt fp8", tmp_path / "model", rng)
    path = tmp_path / "model/model.safetensors"
    tensors, layers, wanted = builders.tensors_of(path), {}, {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        layers[module] = {"quant_algo": "FP8"}
        if ".down_proj" in module:
            layers[module] = {"quant_algo": "W4A16_AWQ", "group_size": 32}
            made, wanted[module] = foreign.awq_of_modelopt(rng, *tensors[name].shape)
            tensors |= {f"{module}.{end}": np.ascontiguousarray(a) for end, a in made.items()}
    builders.write(path, tensors)
    said = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    builders.edit_config(tmp_path / "model", quantization_config=said)
    model = load(tmp_path / "model")
    down = model.layers[1].mlp.down_proj.kernel.canonical()
    assert (down.spec.format, model.layers[1].mlp.gate_up_proj.kernel.spec.format) == (
        "int4",
        "float8_e4m3",
    )
    weight = wanted["model.layers.1.mlp.down_proj"]
    np.testing.assert_allclose(fdq.dequantize(down), weight, rtol=2e-7)
    layers.pop("model.layers.0.mlp.up_proj")
    builders.edit_config(tmp_path / "model", quantization_config=said)
    with pytest.raises(CheckpointError, match="up_proj' has codes, but config.json leaves it"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "said", "names"),
    [
        (
            "packed",
            {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
            ("k_scale", "v_scale"),
        ),
        slow("modelopt fp8", {"kv_cache_quant_algo": "FP8"}, ("k_proj.k_scale", "v_proj.v_scale")),
    ],
)
def test_static_scales_of_the_cache(kind, said, names, tmp_path, rng, caplog):
    foreign.model(kind, tmp_path / "model", rng)
    scales = {}

    def add(tensors):
        for i, part in enumerate(names):
            for layer in range(len(load(tmp_path / "model").layers)):
                name = f"model.layers.{layer}.self_attn.{part}"
                tensors[name] = np.array([0.25 * (i + 1) + layer], np.float32)
                scales[layer, "kv"[i]] = tensors[name]

    changed(tmp_path / "model", add)
    config = foreign.CONFIGS[kind][0] | said
    builders.edit_config(tmp_path / "model", quantization_config=config)
    model = load(tmp_path / "model")
    assert str(model.cache_spec) == "Cfp8-kvhead"
    for (layer, part), scale in scales.items():
        found = getattr(model.cache_scales[layer], part)
        np.testing.assert_array_equal(found, np.broadcast_to(scale, (2, 1)))
    assert model.init_cache(1, 8).layers[0].k.spec == model.cache_spec
    changed(tmp_path / "model", lambda tensors: tensors.pop(f"model.layers.1.self_attn.{names[1]}"))
    assert load(tmp_path / "model").cache_spec is None
    assert f"layers.1.self_attn.{names[1]} is missing" in caplog.text


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
_FLOAT8 = ("weight", "weight_scale")


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

    changed(tmp_path / "model", change)
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

    changed(tmp_path / "model", change)
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


def test_every_owner_is_in_the_fixtures():
    assert array("gptq", "b4_g32/codes").dtype == np.uint8
    methods = {method for _, method in OWNERS.values()}
    of_fastdeploy = set(FastDeploy.methods)  # by Paddle's bytes, in a file of their own
    others = {"bitsandbytes", "fbgemm_fp8", "auto-round", "nvfp4", "modelopt_fp4", "mxfp4"}
    elsewhere = {"mlx", "hqq", "torchao", "gemma"}  # test_quantized_layers.py, and whole models
    assert methods | others | elsewhere | of_fastdeploy == set(CODECS)


def test_scales_of_blocks_of_any_size():
    """A file may say 2**70: no more memory is taken than there are weights."""
    scale = np.arange(3.0)
    assert bitsandbytes._repeated(scale, 2, 5).tolist() == [0, 0, 1, 1, 2]
    assert bitsandbytes._repeated(scale, 2**70, 3).tolist() == [0, 0, 0]
