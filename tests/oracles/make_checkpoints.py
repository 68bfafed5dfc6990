"""Makes `formats/{gptq,checkpoints}.npz`: packed weights as published checkpoints hold them.

    python make_checkpoints.py                      # both; gptq needs requirements-gptq.txt
    python make_checkpoints.py --check checkpoints  # only verify one

The bytes are random codes and scales, so that every field of a word is used; what they decode to
is the answer of the library that reads such checkpoints.
"""

import os

import numpy as np
import torch
from make_formats import E2M1, E4M3, bit_stream, bits, main, rng_of, same, write

GPTQ_CASES = {  # name -> (bits, group size, desc_act, symmetric, checkpoint_format)
    "b4_g32": (4, 32, False, True, "gptq"),
    "b4_g32_desc_act": (4, 32, True, True, "gptq"),
    "b4_g64_asym_v2": (4, 64, False, False, "gptq_v2"),
    "b8_channel": (8, -1, False, True, "gptq"),
    "b3_g32": (3, 32, False, True, "gptq"),
    "b2_g32_asym_v2": (2, 32, True, False, "gptq_v2"),
    **{
        f"b{width}_g32{'' if sym else '_asym'}_order": (
            width,
            32,
            True,
            sym,
            "gptq" if sym else "gptq_v2",
        )
        for width in (2, 3, 4, 8)
        for sym in (True, False)
    },
}
GPTQ_KEYS = {
    "<case>/qweight": "int32 [in*bits/32, out], packed along in, little endian",
    "<case>/qzeros": "int32 [groups, out*bits/32], packed along out; v1 stores zero - 1",
    "<case>/scales": "float16 [groups, out]",
    "<case>/g_idx": "int32 [in]; a permutation of the groups in the desc_act cases",
    "<case>/codes": "uint8 [in=128, out=32], the codes that went in",
    "<case>/decoded": "float32 [in, out] = scale * (code - zero), dequantized by gptqmodel",
    "<case>": "b<bits>_<group>; `_v2` is checkpoint_format gptq_v2, the others are gptq (v1)",
}


def make_gptq() -> None:
    """Packs random codes with gptqmodel, in the v1 or v2 layout, and dequantizes them."""
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # do not compile anything
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    arrays, rows, columns = {}, 128, 32
    for case, (width, group, desc_act, sym, layout) in GPTQ_CASES.items():
        rng, groups = rng_of(case), 1 if group == -1 else rows // group
        g_idx = np.arange(rows) // (rows // groups)
        if desc_act:
            g_idx = rng.permutation(g_idx)
        codes = rng.integers(0, 2**width, (rows, columns))
        zeros = np.full((groups, columns), 2 ** (width - 1))
        if not sym:
            zeros = rng.integers(0, 2**width, zeros.shape)
        scales = rng.uniform(0.001, 0.05, zeros.shape).astype(np.float16)
        w = scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx])
        source = torch.nn.Linear(rows, columns, bias=False)
        source.weight.data = torch.from_numpy(w.T.astype(np.float32).copy())
        linear = TorchLinear(width, group, sym, desc_act, rows, columns, bias=False)
        linear.pack_block(
            source,
            torch.from_numpy(scales.T.astype(np.float32).copy()),
            torch.from_numpy(zeros.T.astype(np.float32).copy()),
            torch.from_numpy(g_idx.astype(np.int32)),
        )
        linear.post_init()
        linear.scales = linear.scales.float()  # otherwise products round to float16
        arrays[f"{case}/decoded"] = linear.dequantize_weight().numpy()
        if layout == "gptq":
            convert_gptq_v2_to_v1_format_module(linear, linear)  # it reads bits, pack_dtype
        for key in ("qweight", "qzeros", "g_idx"):
            arrays[f"{case}/{key}"] = getattr(linear, key).numpy()
        arrays[f"{case}/scales"] = scales
        arrays[f"{case}/codes"] = codes.astype(np.uint8)
    write("gptq", ("gptqmodel", "torch"), GPTQ_KEYS, arrays)


def check_gptq(arrays: dict) -> None:
    """Decodes from the definition: a bit stream along in, another along out."""
    for case, (width, _, _, _, layout) in GPTQ_CASES.items():
        state = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(case + "/")}
        rows, columns = state["codes"].shape
        codes = bit_stream(state["qweight"].T, width, rows).T
        np.testing.assert_array_equal(codes, state["codes"])
        zeros = bit_stream(state["qzeros"], width, columns) + (layout == "gptq")
        scales = state["scales"].astype(np.float32)
        got = scales[state["g_idx"]] * (codes - zeros[state["g_idx"]])
        same(got.astype(np.float32), state["decoded"], case, rtol=1e-6)


# AWQ, HF block fp8, gpt-oss, ModelOpt ------------------------------------------------------------

CHECKPOINT_KEYS = {
    "awq/qweight": "int32 [in=128, out/8=8]; nibble j holds column (0 2 4 6 1 3 5 7)[j]",
    "awq/qzeros": "int32 [groups=4, out/8=8], stored as is, same order",
    "awq/scales": "float16 [groups=4, out=64]",
    "awq/decoded": "float32 [out, in], by compressed-tensors' AutoAWQConverter",
    "hf_fp8/weight": "uint8 bits of e4m3fn [out=200, in=136]",
    "hf_fp8/weight_scale_inv": "float32 [2, 2], multiplies; the last blocks are partial",
    "hf_fp8/decoded": "float32 [out, in], by compressed-tensors' FP8BlockDequantizer",
    "gpt_oss/<proj>_blocks": "uint8 [experts=2, out=24, in/32=3, 16], low nibble first",
    "gpt_oss/<proj>_scales": "uint8 [experts, out, in/32], e8m0",
    "gpt_oss/decoded": "float32 [experts, in=96, out=24], by transformers (note the transpose)",
    "modelopt_nvfp4/weight": "uint8 [out=48, in/2=32], low nibble first",
    "modelopt_nvfp4/weight_scale": "uint8 bits of e4m3fn [out, in/16=4]",
    "modelopt_nvfp4/weight_scale_2": "float32 [], multiplies",
    "modelopt_nvfp4/decoded": "float32 [out, in], by compressed-tensors' ModelOptNvfp4Converter",
}


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...], sign: bool = True) -> np.ndarray:
    """uint8 bits of finite float8_e4m3fn values."""
    byte = rng.integers(1, 0x7F, shape, dtype=np.uint8)
    return byte | (rng.integers(0, 2, shape, dtype=np.uint8) << 7) if sign else byte


def make_checkpoints() -> None:
    """Converts random AWQ, fp8-block, gpt-oss and ModelOpt tensors with their readers."""
    import compressed_tensors.compressors as compressors
    from compressed_tensors import quantization
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.entrypoints.convert import converters
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def as_torch(prefix: str, keys: dict[str, torch.dtype | None]) -> dict[str, torch.Tensor]:
        tensors = {}
        for key, dtype in keys.items():
            value = torch.from_numpy(arrays[f"{prefix}/{key}"].copy())
            tensors[f"m.{key}"] = value if dtype is None else value.view(dtype)
        return tensors

    rng, arrays = rng_of("checkpoints"), {}
    word = np.iinfo(np.int32)
    arrays["awq/qweight"] = rng.integers(word.min, word.max, (128, 8), np.int32, endpoint=True)
    arrays["awq/qzeros"] = rng.integers(word.min, word.max, (4, 8), np.int32, endpoint=True)
    arrays["awq/scales"] = rng.uniform(0.001, 0.05, (4, 64)).astype(np.float16)
    converter = converters.AutoAWQConverter.from_autoawq_config({"bits": 4, "group_size": 32})
    state = converter.process(as_torch("awq", {"qweight": None, "qzeros": None, "scales": None}))
    state = {key.removeprefix("m."): value for key, value in state.items()}
    state["weight_scale"] = state["weight_scale"].float()
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(num_bits=4, group_size=32, symmetric=False),
    )
    codec = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    arrays["awq/decoded"] = codec.decompress(state, scheme)["weight"].numpy()

    arrays["hf_fp8/weight"] = random_e4m3(rng, (200, 136))
    arrays["hf_fp8/weight_scale_inv"] = rng.uniform(1e-4, 1e-3, (2, 2)).astype(np.float32)
    tensors = as_torch("hf_fp8", {"weight": torch.float8_e4m3fn, "weight_scale_inv": None})
    converter = converters.FP8BlockDequantizer(dtype=torch.float32)
    arrays["hf_fp8/decoded"] = converter.process(tensors)["m.weight"].numpy()

    blocks = rng.integers(0, 256, (2, 24, 3, 16), dtype=np.uint8)
    scales = rng.integers(115, 130, (2, 24, 3), dtype=np.uint8)
    decoded = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    arrays["gpt_oss/gate_up_proj_blocks"], arrays["gpt_oss/gate_up_proj_scales"] = blocks, scales
    arrays["gpt_oss/decoded"] = decoded.numpy()

    arrays["modelopt_nvfp4/weight"] = rng.integers(0, 256, (48, 32), dtype=np.uint8)
    arrays["modelopt_nvfp4/weight_scale"] = random_e4m3(rng, (48, 4), sign=False)
    arrays["modelopt_nvfp4/weight_scale_2"] = np.array(3.7e-4, np.float32)
    keys = {"weight": None, "weight_scale": torch.float8_e4m3fn, "weight_scale_2": None}
    converter = converters.ModelOptNvfp4Converter(targets=["re:m$"])
    state = converter.process(as_torch("modelopt_nvfp4", keys))
    decoded = quantization.lifecycle.forward.dequantize(
        unpack_fp4_from_uint8(state["m.weight_packed"], 48, 64, dtype=torch.float32),
        scale=state["m.weight_scale"].float(),
        args=quantization.QuantizationArgs(
            num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
        global_scale=state["m.weight_global_scale"],
        dtype=torch.float32,
    )
    arrays["modelopt_nvfp4/decoded"] = bits(decoded)
    write("checkpoints", ("compressed-tensors", "transformers", "torch"), CHECKPOINT_KEYS, arrays)


def check_checkpoints(arrays: dict) -> None:
    """Decodes the four layouts from their definitions."""
    order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
    codes = bit_stream(arrays["awq/qweight"], 4, 64).reshape(-1, 8, 8)[..., order]
    zeros = bit_stream(arrays["awq/qzeros"], 4, 64).reshape(-1, 8, 8)[..., order]
    centred = codes.reshape(128, 64) - np.repeat(zeros.reshape(4, 64), 32, axis=0)
    got = centred * np.repeat(arrays["awq/scales"].astype(np.float32), 32, axis=0)
    same(got.T.astype(np.float32), arrays["awq/decoded"], "awq", rtol=1e-6)

    scale = np.repeat(np.repeat(arrays["hf_fp8/weight_scale_inv"], 128, axis=0), 128, axis=1)
    got = E4M3[arrays["hf_fp8/weight"]] * scale[:200, :136]
    same(got, arrays["hf_fp8/decoded"], "hf_fp8", rtol=1e-6)

    byte, scale = arrays["gpt_oss/gate_up_proj_blocks"], arrays["gpt_oss/gate_up_proj_scales"]
    value = E2M1[np.stack([byte & 15, byte >> 4], axis=-1)].reshape(2, 24, 3, 32)
    got = (value * np.exp2(scale.astype(np.float32) - 127)[..., None]).reshape(2, 24, 96)
    same(got.transpose(0, 2, 1), arrays["gpt_oss/decoded"], "gpt_oss")

    byte = arrays["modelopt_nvfp4/weight"]
    value = E2M1[np.stack([byte & 15, byte >> 4], axis=-1)].reshape(48, 4, 16)
    scale = E4M3[arrays["modelopt_nvfp4/weight_scale"]] * arrays["modelopt_nvfp4/weight_scale_2"]
    got = (value * scale[..., None]).reshape(48, 64)
    same(got, arrays["modelopt_nvfp4/decoded"], "modelopt_nvfp4", rtol=1e-6)


MAKERS = {
    "checkpoints": (make_checkpoints, check_checkpoints),
    "gptq": (make_gptq, check_gptq),
}

if __name__ == "__main__":
    main(MAKERS)
