"""Models that other tools quantized: loaded as they are, bit for bit, and decoded like theirs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq_checkpoints import CheckpointError, convert, inspect, load
from fdq_checkpoints.sources import bitsandbytes
from tests.checkpoints import builders, foreign
from tests.covering import slow, slow_but


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

    builders.change_tensors(tmp_path / "model", change)
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


def test_biases_of_zeros_that_no_layer_has_are_let_through(tmp_path, rng):
    """AutoGPTQ writes one for every layer."""
    foreign.model("gptq", tmp_path / "model", rng)

    def add(tensors):
        for name in [n for n in tensors if n.endswith(".qweight")]:
            width = tensors[name].shape[1]
            tensors[name.replace("qweight", "bias")] = np.zeros(width, np.float16)

    builders.change_tensors(tmp_path / "model", add)
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

    builders.change_tensors(tmp_path / "model", add)
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

    builders.change_tensors(tmp_path / "model", only_v)
    model, twin = load(tmp_path / "model"), float_twin(decoded, tmp_path / "twin", "llama")
    tokens = jnp.array([[1, 5, 9]])
    np.testing.assert_allclose(model(tokens), twin(tokens), atol=2e-4, rtol=1e-4)


def test_an_expert_that_calibration_never_reached_has_no_scale_of_its_input(tmp_path, rng):
    foreign.model("modelopt fp8, static", tmp_path / "model", rng, "qwen3_moe")
    path = "model.layers.0.mlp.experts"

    def drop(tensors):
        for part in ("gate", "up", "down"):
            del tensors[f"{path}.0.{part}_proj.input_scale"]

    builders.change_tensors(tmp_path / "model", drop)
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
    builders.change_tensors(tmp_path / "model", _other_order)
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

    builders.change_tensors(tmp_path / "model", in_order)
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

    builders.change_tensors(tmp_path / "model", add)
    config = foreign.CONFIGS[kind][0] | said
    builders.edit_config(tmp_path / "model", quantization_config=config)
    model = load(tmp_path / "model")
    assert str(model.cache_spec) == "Cfp8-kvhead"
    for (layer, part), scale in scales.items():
        found = getattr(model.cache_scales[layer], part)
        np.testing.assert_array_equal(found, np.broadcast_to(scale, (2, 1)))
    assert model.init_cache(1, 8).layers[0].k.spec == model.cache_spec
    builders.change_tensors(
        tmp_path / "model", lambda tensors: tensors.pop(f"model.layers.1.self_attn.{names[1]}")
    )
    assert load(tmp_path / "model").cache_spec is None
    assert f"layers.1.self_attn.{names[1]} is missing" in caplog.text


_FLOAT8 = ("weight", "weight_scale")


def test_scales_of_blocks_of_any_size():
    """A file may say 2**70: no more memory is taken than there are weights."""
    scale = np.arange(3.0)
    assert bitsandbytes._repeated(scale, 2, 5).tolist() == [0, 0, 1, 1, 2]
    assert bitsandbytes._repeated(scale, 2**70, 3).tolist() == [0, 0, 0]
