"""Offline checkpoints of FastDeploy: by its methods' definitions, and by Paddle's own packing."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fdq
from fdq_checkpoints import CheckpointError, convert, inspect, load
from fdq_checkpoints.sources.fastdeploy import unpermuted
from tests import fastdeploy_configs
from tests.checkpoints import builders
from tests.covering import slow, slow_but
from tests.formats.oracles import fixture

H, VOCAB, HEADS, KV, D, EXPERTS = 128, 96, 4, 2, 32, 4
CONFIG = {
    "hidden_size": H, "intermediate_size": 256, "moe_intermediate_size": 128, "vocab_size": VOCAB,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": D,
    "num_hidden_layers": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
LAYERS = {
    "ernie.layers.{i}.self_attn.qkv_proj": (H, (HEADS + 2 * KV) * D),
    "ernie.layers.{i}.self_attn.o_proj": (HEADS * D, H),
    "ernie.layers.0.mlp.up_gate_proj": (H, 512),
    "ernie.layers.0.mlp.down_proj": (256, H),
    "ernie.layers.1.mlp.experts.{e}.up_gate_proj": (H, 256),
    "ernie.layers.1.mlp.experts.{e}.down_proj": (128, H),
}


def permuted(codes, bits):
    """Signed codes `[K, N]` as Paddle lays them out for its mixed GEMM, step by step."""
    k, n = codes.shape
    rows, columns, register = {8: (16, 2, 4), 4: (32, 4, 8)}[bits]
    source = [8 * (row % register // 2) + row % 2 + 2 * (row // register) for row in range(rows)]
    moved = codes.reshape(k // rows, rows, n)[:, source].reshape(k, n).T
    tiles = moved.reshape(n // columns, columns, k // 64, 64).transpose(0, 2, 1, 3)
    unsigned = (tiles.reshape(-1).astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 8:
        return unsigned.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(n, k).view(np.int8)
    nibbles = unsigned.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).reshape(n // 2, k).view(np.int8)


def weight_only(rng, k, n, bits):
    bound = 2 ** (bits - 1) - 1
    codes = rng.integers(-bound, bound + 1, (k, n)).astype(np.int8)
    scale = rng.uniform(0.001, 0.002, n).astype(ml_dtypes.bfloat16)
    tensors = {"quant_weight": permuted(codes, bits), "weight_scale": scale}
    return tensors, codes * scale.astype(np.float32)


def blocks(rng, k, n, bits):
    codes = rng.standard_normal((k, n)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.01, 0.02, (-(-k // 128), -(-n // 128))).astype(np.float32)
    wide = np.repeat(np.repeat(scale, 128, 0)[:k], 128, 1)[:, :n]
    stored = codes.view(np.int8) if bits else codes
    return {"quant_weight": stored, "weight_scale": scale}, codes.astype(np.float32) * wide


def convolutional(rng, k, n, bits):
    """Decoded by a loop over the definition."""
    codes = rng.integers(0, 256, (k // 4, n)).astype(np.uint8)
    local = rng.integers(0, 256, (k // 128, n)).astype(np.uint8)
    of_columns = {
        "code_scale": rng.uniform(115, 125, n).astype(np.float32),
        "code_zp": rng.uniform(900, 1200, n).astype(np.float32),
        "super_scales": rng.uniform(0.0001, 0.0002, n).astype(ml_dtypes.bfloat16),
    }
    step, zero = of_columns["code_scale"], of_columns["code_zp"]
    word = np.floor(codes * step + zero + np.float32(0.5)).astype(np.int32)
    values = np.stack([((word >> shift) & 63) - 32 for shift in (9, 6, 3, 0)], axis=1)
    weight = values.reshape(k, n).astype(np.float32)
    for group in range(k // 64):
        nibble = local[group // 2] >> 4 if group % 2 == 0 else local[group // 2] & 15
        weight[64 * group : 64 * group + 64] *= nibble
    weight *= of_columns["super_scales"].astype(np.float32)
    return {"quant_weight": codes, "weight_scale": local, **of_columns}, weight


MAKERS = {
    "wint8": (weight_only, 8),
    "wint4": (weight_only, 4),
    "block_wise_fp8": (blocks, 0),
    "fp8 as int8": (blocks, 8),
    "wint2": (convolutional, 2),
}
MIXED = {"quantization": "mix_quant", "is_quantized": True}
TWO_BITS = json.loads(json.dumps(fastdeploy_configs.WINT2))
_PARTS = TWO_BITS["moe_quant_config"]
_PARTS["moe_w4_quant_config"]["quant_end_layer"] = 0
_PARTS["moe_w2_quant_config"].update(quant_start_layer=1, quant_end_layer=1)
# By name: quantization_config, how linear layers and experts are made.
KINDS = {
    "wint8": ({"quantization": "wint8"}, "wint8", "wint8"),
    "mix_quant": (
        MIXED | {"dense_quant_type": "wint8", "moe_quant_type": "wint4"}, "wint8", "wint4"
    ),
    "fp8": ({"quantization": "block_wise_fp8", "is_quantized": True},) + ("block_wise_fp8",) * 2,
    "fp8 as int8": (
        MIXED | {"dense_quant_type": "block_wise_fp8", "moe_quant_type": "block_wise_fp8"},
        *("fp8 as int8",) * 2,
    ),
    "experts": (
        {"quantization": "mix_quant", "is_moe_quantized": True, "moe_quant_type": "wint4"},
        None,
        "wint4",
    ),
    "wint2": (TWO_BITS, "wint8", "wint2"),
}  # fmt: skip


def offline(kind, folder, rng, more=None, **config):
    """A directory of a kind; its float twin beside it, in the same names."""
    said, dense, experts = KINDS[kind]
    stored = {
        "ernie.embed_tokens.weight": rng.standard_normal((VOCAB, H)).astype(np.float32),
        "ernie.norm.weight": np.ones(H, np.float32),
        "lm_head.weight": rng.standard_normal((H, VOCAB)).astype(np.float32) / 8,
        "ernie.layers.1.mlp.gate.weight": rng.standard_normal((H, EXPERTS)).astype(np.float32),
        "ernie.layers.1.mlp.moe_statics.e_score_correction_bias": np.zeros((1, EXPERTS), "f4"),
    }
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            stored[f"ernie.layers.{i}.{norm}.weight"] = np.ones(H, np.float32)
    decoded = dict(stored)
    modules = dict.fromkeys(
        name.format(i=i, e=e) for name in LAYERS for i in range(2) for e in range(EXPERTS)
    )
    for module in modules:
        shape = next(
            s for n, s in LAYERS.items()
            if module in [n.format(i=i, e=e) for i in range(2) for e in range(EXPERTS)]
        )  # fmt: skip
        method = experts if ".experts." in module else dense
        if method is None:
            weight = rng.standard_normal(shape).astype(np.float32) / 16
            stored[f"{module}.weight"] = decoded[f"{module}.weight"] = weight
            continue
        make, bits = MAKERS[method]
        tensors, weight = make(rng, *shape, bits)
        stored |= {f"{module}.{key}": np.ascontiguousarray(a) for key, a in tensors.items()}
        decoded[f"{module}.weight"] = np.ascontiguousarray(weight.astype(np.float32))
    stored |= more or {}
    for path, tensors in ((folder, stored), (folder.with_name("twin"), decoded)):
        builders.model("ernie4_5_moe_untied", path)
        builders.edit_config(path, **CONFIG)
        builders.write(path / "model.safetensors", tensors)
    builders.edit_config(folder, quantization_config=said | config)
    return folder


def weights(model):
    moe = model.layers[1].mlp.experts
    return (
        model.layers[0].self_attn.qkv_proj.kernel, model.layers[1].self_attn.o_proj.kernel,
        model.layers[0].mlp.gate_up_proj.kernel, model.layers[0].mlp.down_proj.kernel,
        moe.gate_up_proj.kernel, moe.down_proj.kernel,
    )  # fmt: skip


@pytest.mark.parametrize("kind", slow_but({"fp8", "wint2"}, KINDS))
def test_weights_are_what_the_definition_says(kind, tmp_path, rng, caplog):
    model = load(offline(kind, tmp_path / "model", rng))
    twin = load(tmp_path / "twin")
    for found, wanted in zip(weights(model), weights(twin), strict=True):
        if isinstance(found, fdq.QTensor):
            found = fdq.dequantize(found.canonical())
        else:
            assert kind == "experts"
            found = found[...]
        np.testing.assert_allclose(found, wanted[...], rtol=3e-7, atol=1e-12)
    assert isinstance(weights(model)[-1], fdq.QTensor)
    assert ("not checked against a published file" in caplog.text) == (kind == "wint2")
    if kind in ("wint8", "experts"):  # the same path for others, but quantized inputs of float8
        tokens = jnp.array([[1, 5, 9, 2, 8]])
        np.testing.assert_allclose(model(tokens), twin(tokens), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("weight", ["normal/bf16", "ties_int{bits}/fp16"])
def test_paddles_own_bytes_decode_to_its_codes(bits, weight):
    arrays = fixture("paddle", f"{weight.format(bits=bits)}/int{bits}_g-1")
    codes = arrays["codes"]
    raw = arrays["raw"]
    found = unpermuted(raw.view(np.uint8), *codes.shape, bits)
    np.testing.assert_array_equal(found.astype(np.int16) - 2 ** (bits - 1), codes)
    np.testing.assert_array_equal(permuted(codes, bits).reshape(-1), raw.reshape(-1).view(np.int8))


def cache_scales(rng, size, zero=False):
    more = {}
    for i in range(2):
        for part in "kv":
            name = f"ernie.layers.{i}.self_attn.cache{part}_matmul.activation_"
            more[name + "scale"] = rng.uniform(1, 5, size).astype(np.float32)
            if zero:
                more[name + "zero_point"] = rng.integers(-8, 8, size).astype(np.float32)
    return more


@pytest.mark.parametrize(
    ("kind", "size", "shape", "bound"),
    [
        ("int8", KV * D, (KV, D), 127),
        slow("float8_e4m3fn", KV, (KV, 1), 448),
        slow("int4_zp", KV, (KV, 1), 1),
    ],
)
def test_scales_of_the_cache_are_those_of_the_model(kind, size, shape, bound, tmp_path, rng):
    more = cache_scales(rng, size, kind == "int4_zp")
    folder = offline("mix_quant", tmp_path / "model", rng, more, kv_cache_quant_type=kind)
    model = load(folder)
    for i, scales in enumerate(model.cache_scales):
        for part in "kv":
            stored = more[f"ernie.layers.{i}.self_attn.cache{part}_matmul.activation_scale"]
            wanted = (stored / np.float32(bound)).reshape(shape)
            np.testing.assert_array_equal(getattr(scales, part), wanted)
            if kind == "int4_zp":
                zero = more[f"ernie.layers.{i}.self_attn.cache{part}_matmul.activation_zero_point"]
                found = getattr(scales, f"{part}_zero")
                assert found.dtype == jnp.uint8
                np.testing.assert_array_equal(found, (zero + 8).reshape(shape))
    assert not model.cache_spec.dynamic
    assert model.init_cache(1, 8).layers[0].k.spec == model.cache_spec
    if kind == "int8":
        convert(folder, tmp_path / "kept", None)
        kept = load(tmp_path / "kept")
        for mine, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert kept.cache_spec == model.cache_spec


def test_a_cache_without_its_scales_is_left_out_with_a_word(tmp_path, rng, caplog):
    more = cache_scales(rng, KV * D)
    del more["ernie.layers.1.self_attn.cachev_matmul.activation_scale"]
    model = load(offline("wint8", tmp_path / "model", rng, more, kv_cache_quant_type="int8"))
    assert "layers.1.self_attn.cachev_matmul.activation_scale is missing" in caplog.text
    assert model.cache_scales is None and model.cache_spec is None


def test_floats_that_fastdeploy_would_quantize_as_it_loads_them(tmp_path, rng):
    offline("wint8", tmp_path / "model", rng)
    config = {"quantization": "wint8", "is_quantized": False}
    builders.edit_config(tmp_path / "twin", quantization_config=config)
    model = load(tmp_path / "twin")
    assert not any(isinstance(weight, fdq.QTensor) for weight in weights(model))


def _set(end, value):
    def change(tensors):
        name = next(n for n in tensors if n.endswith(end))
        tensors[name].reshape(-1).view(np.uint8 if isinstance(value, int) else tensors[name].dtype)[
            0
        ] = value

    return change


def _cut(end):
    def change(tensors):
        name = next(n for n in tensors if n.endswith(end))
        tensors[name] = np.ascontiguousarray(tensors[name][..., :-1])

    return change


def _nothing(tensors):
    del tensors


@pytest.mark.parametrize(
    ("kind", "change", "config", "said"),
    [
        ("mix_quant", _nothing, {"moe_quant_type": "w4a8"}, "moe_quant_type = 'w4a8'.* a kernel"),
        ("mix_quant", _nothing, {"moe_quant_type": "w4afp8"}, "layout of a kernel"),
        ("wint8", _nothing, {"quantization": "w8a8"}, "scales are in files of their own"),
        ("fp8", _nothing, {"quantization": "tensor_wise_fp8"}, "rotated by a Hadamard matrix"),
        ("mix_quant", _nothing, {"is_permuted": False}, "is_permuted = False"),
        (
            "mix_quant",
            _nothing,
            {"dense_quant_type": None},
            "has codes, but .* leaves it in floats",
        ),
        ("mix_quant", _nothing, {"dense_quant_type": "wint9"}, "unknown dense_quant_type"),
        ("fp8", _nothing, {"weight_block_size": [64, 64]}, "weight_block_size"),
        ("wint8", _nothing, {"quantization": "block_wise_fp8"}, "expected .*float32"),
        ("wint2", _nothing, {"moe_quant_type": "wint2"}, "wint2 goes with moe_quant_type 'w4w2'"),
        ("wint8", _cut("o_proj.weight_scale"), {}, "expected .* \\(128,\\) beside the codes"),
        ("wint8", _set("weight_scale", np.nan), {}, "negative or not finite"),
        ("wint2", _set("code_scale", np.inf), {}, "NaN or infinity"),
        ("fp8", _set("quant_weight", 0x7F), {}, "holds NaN"),
        ("wint8", lambda t: t.pop("ernie.layers.0.mlp.down_proj.weight_scale"), {}, "is missing"),
    ],
)
def test_what_cannot_be_is_refused_by_name(kind, change, config, said, tmp_path, rng):
    folder = offline(kind, tmp_path / "model", rng, **config)
    tensors = builders.tensors_of(folder / "model.safetensors")
    tensors = {name: np.array(a) for name, a in tensors.items()}
    change(tensors)
    builders.write(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=said):
        load(folder)
    assert inspect(folder).kind == "model quantized by another tool"


def test_weights_split_for_devices_are_refused(tmp_path, rng):
    folder = offline("wint8", tmp_path / "ERNIE-4.5-300B-A47B-2Bits-TP2-Paddle", rng)
    with pytest.raises(CheckpointError, match="split for several devices"):
        load(folder)
