"""Makes `formats/{compressed_tensors,bitsandbytes,gguf}.npz`: matrices as others encode them.

    python make_formats.py                     # all files
    python make_formats.py gguf bitsandbytes  # some of them
    python make_formats.py --check             # only verify what is there

Every file has a JSON `description` of its keys. NumPy has no bfloat16 and no float8, so such
arrays are stored as their bits (uint16, uint8). Each check decodes the stored bytes a second
time, in NumPy from the definition of the format, and compares with what the library decoded.
"""

import argparse
import importlib.metadata
import json
import pathlib
import zlib

import ml_dtypes
import numpy as np
import torch

FOLDER = pathlib.Path(__file__).resolve().parent / "formats"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def rng_of(name: str) -> np.random.Generator:
    """A generator that depends on `name` only."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def weight(name: str) -> np.ndarray:
    """[out, in] float32: `normal`, heavy-tailed `student` with a zero row, and `odd` shapes."""
    rng = rng_of(name)
    if name == "normal":
        return (0.05 * rng.standard_normal((72, 256))).astype(np.float32)
    if name == "student":
        w = 0.02 * rng.standard_t(3, (24, 384))
        w[0] = 0
        return w.astype(np.float32)
    return (rng.standard_normal((130, 72)) * np.exp2(rng.integers(-9, 2, (130, 1)))).astype("f4")


def bits(tensor: torch.Tensor) -> np.ndarray:
    """NumPy copy; dtypes that NumPy lacks become unsigned integers of the same width."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def write(name: str, packages: tuple[str, ...], keys: dict[str, str], arrays: dict) -> None:
    """Writes `formats/<name>.npz` with its description."""
    made_by = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    FOLDER.mkdir(exist_ok=True)
    description = np.array(json.dumps({"made_by": made_by, "keys": keys}))
    np.savez_compressed(FOLDER / f"{name}.npz", description=description, **arrays)


def same(got: np.ndarray, want: np.ndarray, message: str, rtol: float = 0.0) -> None:
    """Asserts equality (or `rtol`) and that the reference is not zero."""
    assert np.abs(want[np.isfinite(want)]).max() > 0, message
    np.testing.assert_allclose(got, want, rtol=rtol, atol=0, err_msg=message)


# compressed-tensors ----------------------------------------------------------------------------

CT_CASES = {  # name -> (format, weight arguments, weights it runs on)
    "int4_g128": ("pack-quantized", {"group_size": 128}, ("normal", "student")),
    "int4_g128_asym": ("pack-quantized", {"group_size": 128, "symmetric": False}, ("student",)),
    "int4_channel": ("pack-quantized", {}, ("odd",)),
    "int4_channel_asym": ("pack-quantized", {"symmetric": False}, ("odd",)),
    "int8_g128": ("pack-quantized", {"num_bits": 8, "group_size": 128}, ("student",)),
    "int8_channel": ("int-quantized", {"num_bits": 8}, ("normal", "student", "odd")),
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float"}, ("normal", "odd")),
    "fp8_tensor": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        ("student",),
    ),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        ("normal", "student", "odd"),
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
            "zp_dtype": torch.float8_e4m3fn,
        },
        ("normal", "student"),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"type": "float", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
        ("normal", "student"),
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {
            "num_bits": 8,
            "type": "float",
            "group_size": 32,
            "scale_dtype": torch.uint8,
            "zp_dtype": torch.uint8,
        },
        ("normal", "student"),
    ),
}
CT_KEYS = {
    "<weight>/weight": "[out, in] float32",
    "<weight>/<case>/decoded": "[out, in] float32, the library's decompression in float32",
    "<weight>/<case>/weight": "[out, in] int8, or uint8 bits of float8_e4m3fn",
    "<weight>/<case>/weight_packed": "int32 words along in, or uint8 with two e2m1, low first",
    "<weight>/<case>/weight_scale": "float32; nvfp4: uint8 bits of e4m3fn; mx: uint8 e8m0",
    "<weight>/<case>/weight_global_scale": "[1] float32, nvfp4 only; it divides",
    "<weight>/<case>/weight_zero_point": "int32 words packed along out, asymmetric only",
    "<weight>/<case>/weight_shape": "[2] int64",
    "<weight>/bf16_int4_g128/...": "the same from a bfloat16 weight: scale and decoded are uint16",
}


def ct_scales(w: torch.Tensor, args) -> dict[str, torch.Tensor]:
    """Min-max scales, zero points and global scale by compressed-tensors' own helpers."""
    from compressed_tensors.quantization import utils

    rows, columns = w.shape
    if args.strategy == "tensor":
        view, axes = w, (0, 1)
    elif args.strategy == "block":
        view = utils.maybe_pad_tensor_for_block_quant(w, (128, 128))
        view, axes = view.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)), (1, 3)
    else:
        view, axes = w.reshape(rows, -1, args.group_size or columns), (-1,)
    low, high = view.amin(axes), view.amax(axes)
    state = {}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = utils.generate_gparam(w.min(), w.max())
    scale, zero = utils.calculate_qparams(low, high, args, state.get("weight_global_scale"))
    return {"weight_scale": scale, "weight_zero_point": zero, **state}


def make_compressed_tensors() -> None:
    """Compresses and decompresses every case of `CT_CASES`."""
    import compressed_tensors.compressors as compressors
    from compressed_tensors import quantization
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    arrays = {f"{name}/weight": weight(name) for name in ("normal", "student", "odd")}
    runs = [(c, name, torch.float32) for c, spec in CT_CASES.items() for name in spec[2]]
    for case, name, dtype in [*runs, ("int4_g128", "student", torch.bfloat16)]:
        format_name, options, _ = CT_CASES[case]
        args = quantization.QuantizationArgs(
            **{
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "dynamic": False,
                "strategy": "group" if "group_size" in options else "channel",
                **options,
            }
        )
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
        codec = compressors.BaseCompressor.get_value_from_registry(format_name)
        w = torch.from_numpy(arrays[f"{name}/weight"]).to(dtype)
        state = codec.compress({"weight": w, **ct_scales(w, args)}, scheme)
        if case in ("nvfp4", "mxfp4"):  # `decompress` would round to bfloat16
            packed = state["weight_packed"]
            decoded = quantization.lifecycle.forward.dequantize(
                unpack_fp4_from_uint8(packed, len(w), w.shape[1], dtype=torch.float32),
                scale=codec._decompress_scale(state["weight_scale"], torch.float32),
                args=args,
                global_scale=state.get("weight_global_scale"),
                dtype=torch.float32,
            )
        else:
            decoded = codec.decompress(state, scheme)["weight"]
        prefix = f"{name}/{'bf16_' if dtype == torch.bfloat16 else ''}{case}"
        arrays |= {f"{prefix}/{key}": bits(value) for key, value in state.items()}
        arrays[f"{prefix}/decoded"] = bits(decoded.to(dtype))
    write("compressed_tensors", ("compressed-tensors", "torch"), CT_KEYS, arrays)


def bit_stream(words: np.ndarray, width: int, count: int) -> np.ndarray:
    """[rows, words] int32 -> [rows, count] unsigned fields of `width` bits, little endian."""
    flat = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    flat = flat[:, : count * width].reshape(len(words), count, width).astype(np.int64)
    return (flat << np.arange(width)).sum(axis=-1)


def check_compressed_tensors(arrays: dict) -> None:
    """Decodes every case from the definition of its format."""
    cases = sorted({k.rpartition("/")[0] for k in arrays if k.endswith("decoded")})
    assert len(cases) == 1 + sum(len(spec[2]) for spec in CT_CASES.values())
    for case in cases:
        state = {k.rpartition("/")[2]: v for k, v in arrays.items() if k.startswith(case + "/")}
        name, _, kind = case.partition("/")
        w, scale = arrays[f"{name}/weight"], state["weight_scale"]
        rows, columns = w.shape
        rtol = 1e-6
        if kind.startswith("bf16_"):
            scale = scale.view(ml_dtypes.bfloat16).astype(np.float32)
            state["decoded"] = state["decoded"].view(ml_dtypes.bfloat16).astype(np.float32)
            kind, rtol = kind.removeprefix("bf16_"), 2.0**-8
        if kind.startswith("mx"):
            scale = np.exp2(scale.astype(np.float32) - 127)
        if kind == "nvfp4":
            scale = E4M3[scale] / state["weight_global_scale"]
        if "weight_packed" in state and kind.endswith("fp4"):
            packed = state["weight_packed"]
            codes = E2M1[np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, columns)]
        elif "weight_packed" in state:
            width = int(kind[3])
            codes = bit_stream(state["weight_packed"], width, columns) - 2 ** (width - 1)
            assert tuple(state["weight_shape"]) == w.shape
            if kind.endswith("asym"):
                zero = bit_stream(state["weight_zero_point"].T, width, rows).T - 2 ** (width - 1)
                codes = codes - np.repeat(zero, columns // zero.shape[1], axis=1)
        elif state["weight"].dtype == np.uint8:
            codes = E4M3[state["weight"]]
        else:
            codes = state["weight"]
        if kind == "fp8_block":
            scale = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:rows, :columns]
        elif kind == "fp8_tensor":
            scale = scale.reshape(1, 1)
        else:
            scale = np.repeat(scale, columns // scale.shape[1], axis=1)
        same(codes.astype(np.float32) * scale, state["decoded"], case, rtol)
        error = np.linalg.norm(state["decoded"] - w) / np.linalg.norm(w)
        assert error < (0.03 if "8" in kind.partition("_")[0] else 0.25), (case, error)


# bitsandbytes ----------------------------------------------------------------------------------

BNB_KEYS = {
    "<weight>/weight": "[out, in] float32",
    "<weight>/<nf4|nf4_double>/weight": "[ceil(numel/2), 1] uint8, flat, HIGH nibble first",
    "<weight>/<case>/absmax": "float32 per 64 values; nf4_double: uint8 codes",
    "<weight>/<case>/quant_map": "[16] float32 codebook",
    "<weight>/<case>/nested_absmax": "float32 per 256 absmax (nf4_double)",
    "<weight>/<case>/nested_quant_map": "[256] float32 (nf4_double)",
    "<weight>/<case>/quant_state.bitsandbytes__nf4": "uint8 JSON as in checkpoints (nested_offset)",
    "<weight>/<case>/decoded": "[out, in] float32",
}


def make_bitsandbytes() -> None:
    """NF4 with block 64, with and without double quantization, including a ragged last block."""
    from bitsandbytes import functional

    arrays = {"normal/weight": weight("normal"), "ragged/weight": weight("student")[3:20, :75]}
    for name in ("normal", "ragged"):
        w = torch.from_numpy(arrays[f"{name}/weight"].copy())
        arrays[f"{name}/weight"] = w.numpy()
        for case, double in (("nf4", False), ("nf4_double", True)):
            packed, state = functional.quantize_4bit(
                w, blocksize=64, compress_statistics=double, quant_type="nf4"
            )
            arrays[f"{name}/{case}/weight"] = packed.numpy()
            arrays[f"{name}/{case}/decoded"] = functional.dequantize_4bit(packed, state).numpy()
            for key, value in state.as_dict(packed=True).items():
                arrays[f"{name}/{case}/{key}"] = value.numpy()
    write("bitsandbytes", ("bitsandbytes", "torch"), BNB_KEYS, arrays)


def check_bitsandbytes(arrays: dict) -> None:
    """Decodes NF4 from its definition."""
    for case in ("normal/nf4", "normal/nf4_double", "ragged/nf4", "ragged/nf4_double"):
        state = {k.rpartition("/")[2]: v for k, v in arrays.items() if k.startswith(case + "/")}
        meta = json.loads(state["quant_state.bitsandbytes__nf4"].tobytes())
        packed, absmax = state["weight"].reshape(-1), state["absmax"]
        if absmax.dtype == np.uint8:
            nested = np.repeat(state["nested_absmax"], meta["nested_blocksize"])[: len(absmax)]
            absmax = state["nested_quant_map"][absmax] * nested + np.float32(meta["nested_offset"])
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
        size = int(np.prod(meta["shape"]))
        got = state["quant_map"][codes[:size]] * np.repeat(absmax, meta["blocksize"])[:size]
        same(got.reshape(meta["shape"]), state["decoded"], case, rtol=1e-6)


# gguf ------------------------------------------------------------------------------------------

GGUF_KEYS = {
    "<weight>/weight": "[out, in] float32",
    "<weight>/<q8_0|q4_0|mxfp4>/blocks": "[out, bytes per row] uint8, encoded by gguf",
    "<weight>/<case>/decoded": "[out, in] float32",
    "random/<q4_k|q6_k>/blocks": "[8, 2 blocks] uint8 random bytes with finite float16 scales",
    "random/<case>/decoded": "[8, 512] float32",
}


def make_gguf() -> None:
    """Q8_0, Q4_0 and MXFP4 encoded and decoded; Q4_K and Q6_K decoded from random bytes."""
    from gguf import GGMLQuantizationType, quants

    arrays = {}
    for name in ("normal", "student"):
        arrays[f"{name}/weight"] = weight(name)
        for case in ("q8_0", "q4_0", "mxfp4"):
            kind = GGMLQuantizationType[case.upper()]
            blocks = quants.quantize(arrays[f"{name}/weight"], kind)
            arrays[f"{name}/{case}/blocks"] = blocks
            arrays[f"{name}/{case}/decoded"] = quants.dequantize(blocks, kind)
    for case, size, scales in (("q4_k", 144, (0, 2)), ("q6_k", 210, (208,))):
        rng = rng_of(case)
        blocks = rng.integers(0, 256, (16, size), dtype=np.uint8)
        for at in scales:
            half = rng.uniform(0.001, 0.02, 16).astype(np.float16)
            blocks[:, at : at + 2] = half.view(np.uint8).reshape(16, 2)
        arrays[f"random/{case}/blocks"] = blocks.reshape(8, -1)
        arrays[f"random/{case}/decoded"] = quants.dequantize(
            blocks.reshape(8, -1), GGMLQuantizationType[case.upper()]
        )
    write("gguf", ("gguf",), GGUF_KEYS, arrays)


def check_gguf(arrays: dict) -> None:
    """Decodes the three plain kinds from their definition; K-quants only by shape."""
    for name in ("normal", "student"):
        shape = arrays[f"{name}/weight"].shape
        blocks = arrays[f"{name}/q8_0/blocks"].reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        got = scale * blocks[:, 2:].copy().view(np.int8)
        same(got.reshape(shape), arrays[f"{name}/q8_0/decoded"], "q8_0")
        blocks = arrays[f"{name}/q4_0/blocks"].reshape(-1, 18)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
        got = scale * (codes - 8)
        same(got.reshape(shape), arrays[f"{name}/q4_0/decoded"], "q4_0")
        blocks = arrays[f"{name}/mxfp4/blocks"].reshape(-1, 17)
        codes = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1)
        got = np.exp2(blocks[:, :1].astype(np.float32) - 127) * E2M1[codes]
        same(got.reshape(shape), arrays[f"{name}/mxfp4/decoded"], "mxfp4")
    for case in ("q4_k", "q6_k"):
        decoded = arrays[f"random/{case}/decoded"]
        assert decoded.shape == (8, 512) and np.isfinite(decoded).all() and decoded.std() > 0.1


MAKERS = {
    "compressed_tensors": (make_compressed_tensors, check_compressed_tensors),
    "bitsandbytes": (make_bitsandbytes, check_bitsandbytes),
    "gguf": (make_gguf, check_gguf),
}


def main(makers: dict) -> None:
    """Makes (unless `--check`) and verifies the named files, by default all of `makers`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(makers))
    parser.add_argument("--check", action="store_true", help="only verify")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names or makers:
        make, check = makers[name]
        if not options.check:
            make()
        path = FOLDER / f"{name}.npz"
        arrays = dict(np.load(path))
        about = json.loads(str(arrays.pop("description")))
        check(arrays)
        print(f"{path.name}: {about['made_by']}, {len(arrays)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(MAKERS)
