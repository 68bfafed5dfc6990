"""Models in other tools' layouts, written from their definitions in plain NumPy.

Codes are random, so that every one of them occurs; what a layer's weight is stands beside it.
"""

import json
import pathlib

import ml_dtypes
import numpy as np

from tests.checkpoints import builders

NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis as a dense little-endian stream of int32 words."""
    flat = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    rows = flat.reshape(*codes.shape[:-1], -1)
    missing = -rows.shape[-1] % 32
    rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
    return np.packbits(rows.astype(np.uint8), axis=-1, bitorder="little").view(np.int32)


def repeated(scale: np.ndarray, rows: int, k: int) -> np.ndarray:
    return np.repeat(scale.astype(np.float32), rows, axis=0)[:k]


def order_of(k, group):
    """Groups of rows that lie apart: one order for all layers of as many inputs."""
    return np.random.default_rng(k).permutation(k) // group


def gptq(rng, n, k, *, bits=4, group=32, symmetric=True, first=True, ordered=False):
    codes = rng.integers(0, 2**bits, (k, n))
    groups = k // group
    index = order_of(k, group) if ordered else np.arange(k) // group
    zero = np.full((groups, n), 2 ** (bits - 1))
    if not symmetric:
        zero = rng.integers(1, 2**bits, (groups, n))
    scale = rng.uniform(0.01, 0.02, (groups, n)).astype(np.float16)
    stored = (zero - 1) % 2**bits if first else zero
    tensors = {
        "qweight": np.ascontiguousarray(stream(codes.T, bits).T),
        "qzeros": stream(stored, bits),
        "scales": scale,
        "g_idx": index.astype(np.int32),
    }
    return tensors, (codes - zero[index]) * scale.astype(np.float32)[index]


def awq(rng, n, k, *, group=32):
    codes, zero = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
    scale = rng.uniform(0.01, 0.02, (k // group, n)).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(a):
        return stream(a.reshape(len(a), -1, 8)[..., order].reshape(len(a), -1), 4)

    tensors = {"qweight": words(codes), "qzeros": words(zero), "scales": scale}
    return tensors, (codes - repeated(zero, group, k)) * repeated(scale, group, k)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis as int32 words of `32 // bits` whole codes, as files once had."""
    each = 32 // bits
    missing = -codes.shape[-1] % each
    rows = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    rows = rows.reshape(*codes.shape[:-1], -1, each).astype(np.uint32)
    return (rows << np.arange(0, each * bits, bits, dtype=np.uint32)).sum(-1, np.uint32).view("i4")


def packed(rng, n, k, *, bits=4, group=32, symmetric=True, ordered=False, pack=stream, whole=False):
    group = k if whole else group
    codes, half = rng.integers(0, 2**bits, (n, k)), 2 ** (bits - 1)
    scale = rng.uniform(0.01, 0.02, (n, k // group)).astype(ml_dtypes.bfloat16)
    zero = rng.integers(0, 2**bits, scale.shape) if not symmetric else np.full(scale.shape, half)
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale,
        "weight_shape": np.array([n, k], np.int64),
    }
    if whole:
        tensors["weight_scale"] = scale[:1, 0]
        scale = np.repeat(scale[:1], n, 0)
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack(zero.T, bits).T)
    index = np.arange(k) // group
    if ordered:
        index = order_of(k, group)
        tensors["weight_g_idx"] = index.astype(np.int32)
    return tensors, ((codes - zero[:, index]) * scale.astype(np.float32)[:, index]).T


def awq_of_modelopt(rng, n, k, *, group=32, factor=False):
    """Two's complement nibbles, rows 2r and 2r + 1 of out in a byte."""
    codes = rng.integers(-8, 8, (n, k))
    scale = rng.uniform(0.01, 0.02, (n, k // group)).astype(np.float32)
    tensors = {
        "weight": (codes[::2] & 15 | (codes[1::2] & 15) << 4).astype(np.uint8),
        "weight_scale": scale,
    }
    weight = (codes * np.repeat(scale, group, axis=1)).T
    if not factor:
        return tensors, weight
    tensors["pre_quant_scale"] = rng.uniform(0.5, 2, k).astype(ml_dtypes.bfloat16)
    return tensors, tensors["pre_quant_scale"].astype(np.float32)[:, None] * weight


def plain(rng, n, k, *, dtype=np.int8, shape=None, name="weight_scale"):
    """Codes of 8 bits; `shape` of the scales `(n, k) -> shape`."""
    if dtype == np.int8:
        codes = rng.integers(-128, 128, (n, k)).astype(np.int8)
    else:
        codes = rng.standard_normal((n, k)).astype(ml_dtypes.float8_e4m3fn)
    sizes = (n, 1) if shape is None else shape(n, k)
    scale = rng.uniform(0.01, 0.02, sizes).astype(np.float32)
    full = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    rows, columns = (-(-size // count) for size, count in zip((n, k), full.shape, strict=True))
    if shape is blocks:
        rows = columns = 128
    full = np.repeat(np.repeat(full, rows, 0)[:n], columns, 1)[:, :k]
    return {"weight": codes, name: scale}, (codes.astype(np.float32) * full).T


def with_input(rng, n, k, *, name="input_scale", **options):
    """Also a static scale of the input."""
    tensors, weight = plain(rng, n, k, **options)
    scale = rng.uniform(0.03, 0.04, (1,)).astype(np.float32)
    return tensors | {name: scale}, weight


def blocks(n, k):
    return -(-n // 128), -(-k // 128)


def float4(rng, n, k, *, name="weight_packed", group=16, whole="weight_global_scale"):
    codes = rng.integers(0, 16, (n, k))
    tensors = {name: (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)}
    if group == 32:
        scale = rng.integers(120, 130, (n, k // 32)).astype(np.uint8)
        step, tensors["weight_scale"] = 2.0 ** (scale.astype(np.float32) - 127), scale
    else:
        scale = rng.uniform(1, 400, (n, k // 16)).astype(ml_dtypes.float8_e4m3fn)
        one = np.float32(2.0**14)
        tensors |= {"weight_scale": scale, whole: one.reshape(1)}
        if whole == "weight_scale_2":
            tensors[whole] = (1 / one).reshape(())
        step = scale.astype(np.float32) / one
    return tensors, (E2M1[codes] * np.repeat(step, group, axis=1)).T


def nf4(rng, n, k, *, nested=False, block=64, stored=np.uint8):
    codes = rng.integers(0, 16, (n, k))
    tensors = {
        "weight": (codes[:, ::2] << 4 | codes[:, 1::2])
        .astype(np.uint8)
        .reshape(-1)
        .view(stored)[:, None],
        "weight.quant_map": NF4,
    }
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": [n, k]}
    scale = rng.uniform(0.01, 0.02, -(-n * k // block)).astype(np.float32)
    if nested:
        book = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        small = rng.integers(128, 256, scale.size).astype(np.uint8)
        largest = rng.uniform(0.01, 0.02, -(-scale.size // 256)).astype(np.float32)
        scale = book[small] * np.repeat(largest, 256)[: scale.size] + np.float32(0.01)
        state |= {"nested_blocksize": 256, "nested_offset": float(np.float32(0.01))}
        tensors |= {"weight.nested_absmax": largest, "weight.nested_quant_map": book}
        tensors["weight.absmax"] = small
    else:
        tensors["weight.absmax"] = scale
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors["weight.quant_state.bitsandbytes__nf4"] = text
    return tensors, (NF4[codes] * np.repeat(scale, block)[: n * k].reshape(n, k)).T


def eight_bits(rng, n, k):
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    scb = rng.uniform(1, 2, n).astype(np.float32)
    tensors = {"weight": codes, "SCB": scb, "weight_format": np.array(0, np.uint8)}
    return tensors, (codes * scb[:, None] / 127).T


def mlx(rng, n, k, *, bits=4, group=32, mode="affine"):
    if mode != "affine":
        tensors, weight = float4(rng, n, k, group=group)
        words = np.ascontiguousarray(tensors["weight_packed"]).view(np.uint32)
        scales = tensors["weight_scale"].view(np.uint8)
        # There is no scale of the matrix.
        return {"weight": words, "scales": scales}, weight * (2.0**14 if group == 16 else 1)
    codes = rng.integers(0, 2**bits, (n, k))
    sign = rng.choice([-1.0, 1.0], (n, k // group))
    scale = (sign * rng.uniform(0.01, 0.02, sign.shape)).astype(ml_dtypes.bfloat16)
    bias = rng.uniform(-0.1, 0.1, sign.shape).astype(ml_dtypes.bfloat16)
    tensors = {"weight": stream(codes, bits).view(np.uint32), "scales": scale, "biases": bias}
    return tensors, codes.T * repeated(scale.T, group, k) + repeated(bias.T, group, k)


def hqq(rng, n, k, *, bits=4, group=32):
    codes, rows = rng.integers(0, 2**bits, (n, k)), n * k // group
    scale = rng.uniform(0.01, 0.02, (rows, 1)).astype(np.float16)
    zero = rng.uniform(0, 2**bits - 1, (rows, 1)).astype(np.float16)
    each = {8: 1, 4: 2, 3: 10, 2: 4}[bits]
    parts = np.zeros((-(-rows // each) * each, group), np.int32)
    parts[:rows] = codes.reshape(rows, group)
    words = np.zeros((len(parts) // each, group), np.int32)
    for part in np.split(parts, each):
        words = words << bits | part
    name = {8: b"8bit_u8", 4: b"4bit_u8", 3: b"3bit_32", 2: b"2bit_u8"}[bits]
    tensors = {
        "W_q": words if bits == 3 else words.astype(np.uint8),
        "scale": scale,
        "zero": zero,
        "shape": np.array([n, k]),
        "packing": np.frombuffer(name, np.uint8),
        "view_as_float": np.array(0, np.uint8),
        **{
            key: np.array(value, np.int32)
            for key, value in {"nbits": bits, "group_size": group, "axis": 1}.items()
        },
    }
    centred = codes.reshape(rows, group) - zero.astype(np.float64)
    return tensors, (centred * scale).reshape(n, k).T


def gemma(rng, n, k, *, bits=4):
    codes, half = rng.integers(0, 2**bits, (n, k)), 2 ** (bits - 1)
    packed = stream(codes, bits).view(np.uint8) if bits < 8 else (codes - half).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, (n, 1)).astype(np.float32)
    inputs = {f"{side}put_activation_scale": np.array(0.5, np.float32) for side in ("in", "out")}
    return {"weight": packed, "weight_scale": scale, **inputs}, ((codes - half) * scale).T


def of_groups(format, weights, activation=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activation}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT = {"type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
DYNAMIC = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
CONFIGS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, gptq, {}),
    "gptq v2, 4 bits": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False,
         "checkpoint_format": "gptq_v2"},
        gptq,
        {"symmetric": False, "first": False},
    ),
    "gptq, 3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 32}, gptq, {"bits": 3}),
    "gptq, desc_act": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        gptq,
        {"ordered": True},
    ),
    "gptq v2, desc_act, 3 bits": (
        {"quant_method": "gptq", "bits": 3, "group_size": 32, "desc_act": True, "sym": False,
         "checkpoint_format": "gptq_v2"},
        gptq,
        {"bits": 3, "ordered": True, "symmetric": False, "first": False},
    ),
    "gptq, 2 bits": ({"quant_method": "gptq", "bits": 2, "group_size": 32}, gptq, {"bits": 2}),
    "gptq, 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, gptq, {"bits": 8}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, {}),
    "packed": (of_groups("pack-quantized", INT | {"num_bits": 4}), packed, {}),
    "packed, 8 bits": (of_groups("pack-quantized", INT | {"num_bits": 8}), packed, {"bits": 8}),
    "packed, 3 bits": (of_groups("pack-quantized", INT | {"num_bits": 3}), packed, {"bits": 3}),
    "packed, asymmetric": (
        of_groups("pack-quantized", INT | {"num_bits": 4, "symmetric": False}),
        packed,
        {"symmetric": False},
    ),
    "packed, 5 bits, asymmetric": (
        of_groups("pack-quantized", INT | {"num_bits": 5, "symmetric": False}),
        packed,
        {"bits": 5, "symmetric": False},
    ),
    "packed, 6 bits, actorder": (
        of_groups("pack-quantized", INT | {"num_bits": 6, "actorder": "group"}),
        packed,
        {"bits": 6, "ordered": True},
    ),
    "packed, 7 bits, whole codes": (
        of_groups("pack-quantized", INT | {"num_bits": 7, "symmetric": False}),
        packed,
        {"bits": 7, "symmetric": False, "pack": words},
    ),
    "packed, actorder": (
        of_groups("pack-quantized", INT | {"num_bits": 4, "symmetric": False, "actorder": "group"}),
        packed,
        {"symmetric": False, "ordered": True},
    ),
    "packed, tensors, inputs with zero points": (
        of_groups(
            "pack-quantized",
            INT | {"num_bits": 4, "strategy": "tensor", "group_size": None},
            DYNAMIC | {"symmetric": False},
        ),
        packed,
        {"whole": True},
    ),
    "int8": (
        of_groups("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, DYNAMIC),
        plain,
        {},
    ),
    "float8": (
        of_groups("float-quantized", FLOAT | {"strategy": "channel"}, DYNAMIC | {"type": "float"}),
        plain,
        {"dtype": ml_dtypes.float8_e4m3fn},
    ),
    "int8, static": (
        of_groups(
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "dynamic": False, "strategy": "tensor"},
        ),
        with_input,
        {},
    ),
    "float8, static": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        with_input,
        {"dtype": ml_dtypes.float8_e4m3fn, "shape": lambda n, k: ()},
    ),
    "modelopt fp8, static": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        with_input,
        {"dtype": ml_dtypes.float8_e4m3fn, "shape": lambda n, k: ()},
    ),
    "float8, tensor": (
        of_groups("float-quantized", FLOAT | {"strategy": "tensor"}),
        plain,
        {"dtype": ml_dtypes.float8_e4m3fn, "shape": lambda n, k: (1,)},
    ),
    "float8, blocks": (
        of_groups("float-quantized", FLOAT | {"strategy": "block", "block_structure": [128, 128]}),
        plain,
        {"dtype": ml_dtypes.float8_e4m3fn, "shape": blocks},
    ),
    "nvfp4": (of_groups("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}), float4, {}),
    "mxfp4": (
        of_groups("mxfp4-pack-quantized", {"num_bits": 4, "type": "float"}), float4, {"group": 32}
    ),
    "fine-grained float8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        plain,
        {"dtype": ml_dtypes.float8_e4m3fn, "shape": blocks, "name": "weight_scale_inv"},
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        nf4,
        {},
    ),
    "nf4, twice": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
         "bnb_4bit_use_double_quant": True},
        nf4,
        {"nested": True},
    ),
    "nf4, blocks over rows": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
         "bnb_4bit_quant_storage": "bfloat16"},
        nf4,
        {"block": 192, "stored": ml_dtypes.bfloat16},
    ),
    "llm.int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, eight_bits, {}),
    "modelopt awq": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32},
        awq_of_modelopt,
        {},
    ),
    "modelopt awq, factors": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32},
        awq_of_modelopt,
        {"factor": True},
    ),
    "modelopt int8": (
        {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"},
        with_input,
        {"shape": lambda n, k: (n,)},
    ),
    "modelopt nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        float4,
        {"name": "weight", "whole": "weight_scale_2"},
    ),
    "modelopt fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        plain,
        {"dtype": ml_dtypes.float8_e4m3fn, "shape": lambda n, k: ()},
    ),
    "mlx": ({"bits": 4, "group_size": 32}, mlx, {}),
    "mlx, 3 bits": ({"bits": 3, "group_size": 32}, mlx, {"bits": 3}),
    "mlx, 5 bits": ({"bits": 5, "group_size": 32}, mlx, {"bits": 5}),
    "mlx, 6 bits": ({"bits": 6, "group_size": 64}, mlx, {"bits": 6, "group": 64}),
    "mlx, nvfp4": (
        {"bits": 4, "group_size": 16, "mode": "nvfp4"}, mlx, {"mode": "nvfp4", "group": 16}
    ),
    "mlx, mxfp4": (
        {"bits": 4, "group_size": 32, "mode": "mxfp4"}, mlx, {"mode": "mxfp4", "group": 32}
    ),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, hqq, {}),
    "hqq, 3 bits": ({"quant_method": "hqq", "quant_config": {}}, hqq, {"bits": 3, "group": 64}),
    "gemma": ({"quant_method": "gemma", "modules_to_not_convert": ["lm_head"]}, gemma, {}),
    "gemma, 2 bits": ({"quant_method": "gemma", "num_bits": 2}, gemma, {"bits": 2}),
}  # fmt: skip
"""By name: quantization_config, what makes a layer's tensors and its weight, options of that."""


WIDTHS = {"llama": {"intermediate_size": 128}, "qwen3_moe": {"moe_intermediate_size": 64}}
"""Instead of the oracle's: multiples of 64, the blocks of NF4."""


def model(
    kind: str, folder: pathlib.Path, rng: np.random.Generator, base: str = "llama"
) -> dict[str, np.ndarray]:
    """A model with random codes in all layers but the head; by name, what its weights are.

    The weights are as float checkpoints hold them, `[out, in]`.
    """
    floats = builders.model(base, folder)
    config, make, options = CONFIGS[kind]
    narrow = json.loads((builders.MODELS / base / "config.json").read_text())
    builders.edit_config(folder, **WIDTHS[base])
    wide = {narrow[key]: width for key, width in WIDTHS[base].items()}
    stored, decoded = {}, {}
    for name, array in floats.items():
        module, _, end = name.rpartition(".")
        if not module.endswith("_proj") or end != "weight":
            stored[name] = decoded[name] = array
            continue
        tensors, weight = make(rng, *(wide.get(size, size) for size in array.shape), **options)
        stored |= {f"{module}.{key}": np.array(value, order="C") for key, value in tensors.items()}
        decoded[name] = weight.astype(np.float32).T
    builders.write(folder / "model.safetensors", stored)
    builders.edit_config(folder, quantization_config=config)
    return decoded
