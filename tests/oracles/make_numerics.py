"""Makes `formats/{casts,activations,fastdeploy}.npz`: float8 casts and FastDeploy's arithmetic.

    python make_numerics.py                # all files
    python make_numerics.py --check casts  # only verify one

`casts` holds what torch and ml_dtypes do. `activations` and `fastdeploy` are torch float32
transcriptions of formulas in FastDeploy's sources (named beside each function), one operation per
line, because its own kernels need a GPU; WINT2 is a scalar loop.
"""

import math

import ml_dtypes
import numpy as np
import torch
from make_formats import E2M1, E4M3, bits, main, rng_of, same, write

# float8 casts ----------------------------------------------------------------------------------

CAST_KEYS = {
    "x": "[n] float32: every finite e4m3fn and e5m2 value, the midpoints between neighbours, "
    "the floats just beside them, powers of two, overflow, infinities, NaN",
    "<torch|ml_dtypes>/<e4m3fn|e5m2>": "[n] uint8: plain cast of x",
    "<torch|ml_dtypes>/<e4m3fn|e5m2>_saturated": "[n] uint8: cast of clip(x, -max, max)",
    "<torch|ml_dtypes>/e8m0fnu": "[n] uint8: plain cast of x; the two disagree for x <= 0",
    "decode/<e4m3fn|e5m2|e8m0fnu>": "[256] float32: torch's value of every byte",
    "decode/e2m1": "[16] float32",
    "difference": "plain e4m3fn: torch saturates (448, also for infinity), ml_dtypes gives NaN "
    "beyond 464; both saturated casts agree",
}


def make_casts() -> None:
    """Casts a sweep of float32 values with torch and with ml_dtypes."""
    values = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        grid = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
        grid = np.unique(grid[np.isfinite(grid)])
        middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
        values += [grid, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)]
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64)).astype(np.float32)
    edges = np.array([448, 463.9, 464, 464.1, 480, 500, 57344, 61439, 61440, 61441, 65536, 1e30])
    values += [powers, powers * np.float32(1.5), edges.astype(np.float32), -edges.astype("f4")]
    x = np.concatenate([*values, np.array([-0.0, np.inf, -np.inf, np.nan], np.float32)])
    x = x.astype(np.float32)
    arrays = {"x": x, "decode/e2m1": E2M1}
    for short, largest in (("e4m3fn", 448.0), ("e5m2", 57344.0), ("e8m0fnu", None)):
        in_torch = getattr(torch, f"float8_{short}")
        in_numpy = getattr(ml_dtypes, f"float8_{short}")
        table = torch.arange(256, dtype=torch.uint8).view(in_torch).float()
        arrays[f"decode/{short}"] = table.numpy()
        for suffix, bound in (("", None), ("_saturated", largest)):
            if suffix and largest is None:
                continue
            y = x if bound is None else np.clip(x, -bound, bound)
            with np.errstate(all="ignore"):
                arrays[f"ml_dtypes/{short}{suffix}"] = y.astype(in_numpy).view(np.uint8)
            arrays[f"torch/{short}{suffix}"] = bits(torch.from_numpy(y).to(in_torch))
    write("casts", ("torch", "ml_dtypes"), CAST_KEYS, arrays)


def check_casts(arrays: dict) -> None:
    """Both libraries agree where they should; decoding is the inverse of the cast."""
    x, number = arrays["x"], ~np.isnan(arrays["x"])
    for short in ("e4m3fn", "e5m2"):
        key, table = f"{short}_saturated", arrays[f"decode/{short}"]
        np.testing.assert_array_equal(
            arrays[f"torch/{key}"][number], arrays[f"ml_dtypes/{key}"][number]
        )
        assert np.isnan(table[arrays[f"torch/{key}"][~number]]).all()
        finite = np.unique(table[np.isfinite(table)])
        y = np.clip(x[number].astype(np.float64), finite[0], finite[-1])
        nearest = np.abs(y[:, None] - finite[None].astype(np.float64)).min(axis=1)
        got = table[arrays[f"torch/{key}"][number]].astype(np.float64)
        np.testing.assert_array_equal(np.abs(got - y), nearest)  # nearest, ties compared above
    exponent = np.arange(255, dtype=np.float64) - 127
    np.testing.assert_array_equal(arrays["decode/e8m0fnu"][:255], np.exp2(exponent))
    normal = number & (x > 0) & np.isfinite(x)
    np.testing.assert_array_equal(
        arrays["torch/e8m0fnu"][normal], arrays["ml_dtypes/e8m0fnu"][normal]
    )


# dynamic activations -----------------------------------------------------------------------------

ACTIVATION_KEYS = {
    "x": "[12, 384] float32; rows of very different size, outliers, zeros at [3, 128:256]",
    "fp8_block/codes": "[12, 384] uint8 e4m3fn, per token and 128 channels",
    "fp8_block/scale": "[12, 3] float32, max(absmax, 1e-10) / 448",
    "fp8_token/codes": "[12, 384] uint8 e4m3fn, per token",
    "fp8_token/scale": "[12, 1] float32, absmax / 448",
    "int8_token/codes_half_even": "[12, 384] int8, clip(rint(x / scale), -127, 127)",
    "int8_token/codes_half_away": "[12, 384] int8, the same with ties away from zero",
    "int8_token/scale": "[12, 1] float32, absmax / 127",
    "ties": "row 11 of x has absmax 127 and j + 1/2 elsewhere, so its scale is 1",
}


def half_away(x: torch.Tensor) -> torch.Tensor:
    """Rounds to the nearest integer, ties away from zero."""
    return torch.sign(x) * torch.floor(torch.abs(x) + 0.5)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Saturating cast."""
    return torch.clamp(x, -448.0, 448.0).to(torch.float8_e4m3fn)


def make_activations() -> None:
    """Per-token quantization, dynamic: fp8 per 128 channels, fp8 per token, int8 per token.

    FastDeploy's ops are `per_token_quant_padding` and `scaled_fp8_quant`.
    """
    rng = rng_of("activations")
    x = rng.standard_normal((12, 384)) * np.exp2(rng.integers(-6, 6, (12, 1)))
    x[:, 17] *= 40
    x[3, 128:256] = 0
    x[11] = rng.integers(-120, 120, 384) + 0.5
    x[11, 5] = 127
    x = torch.from_numpy(x.astype(np.float32))
    arrays = {"x": x.numpy()}

    blocks = x.reshape(12, 3, 128)
    scale = torch.clamp(blocks.abs().amax(-1, keepdim=True), min=1e-10) / 448.0
    arrays["fp8_block/codes"] = bits(to_e4m3(blocks / scale).reshape(x.shape))
    arrays["fp8_block/scale"] = scale[..., 0].numpy()

    scale = x.abs().amax(-1, keepdim=True) / 448.0
    arrays["fp8_token/codes"] = bits(to_e4m3(x / scale))
    arrays["fp8_token/scale"] = scale.numpy()

    scale = x.abs().amax(-1, keepdim=True) / 127.0
    for suffix, rounding in (("half_even", torch.round), ("half_away", half_away)):
        codes = torch.clamp(rounding(x / scale), -127, 127).to(torch.int8)
        arrays[f"int8_token/codes_{suffix}"] = codes.numpy()
    arrays["int8_token/scale"] = scale.numpy()
    write("activations", ("torch",), ACTIVATION_KEYS, arrays)


def check_activations(arrays: dict) -> None:
    """Bounds the error and looks for the ties."""
    x = arrays["x"]
    scale = np.repeat(arrays["fp8_block/scale"], 128, axis=1)
    for codes, step in (
        (arrays["fp8_block/codes"], scale),
        (arrays["fp8_token/codes"], arrays["fp8_token/scale"]),
    ):
        error = np.abs(E4M3[codes] * step - x)
        assert (error <= np.maximum(np.abs(x) * 2.0**-4, step * 2.0**-10) * 1.001).all()
    even, away = arrays["int8_token/codes_half_even"], arrays["int8_token/codes_half_away"]
    step = arrays["int8_token/scale"]
    for codes in (even, away):
        assert (np.abs(codes * step - x) <= 0.50001 * step).all()
    assert (np.abs(even.astype(int) - away) <= 1).all() and (even[11] != away[11]).sum() > 100


# FastDeploy weights and KV cache -----------------------------------------------------------------

FASTDEPLOY_KEYS = {
    "weight": "[out=136, in=328] float32, zeros at [0:128, 128:256]",
    "fp8_block/codes": "[out, in] uint8 e4m3fn; per_block_cast_to_fp8: multiplied by 448/absmax",
    "fp8_block/scale": "[2, 3] float32 = 1 / (448 / absmax); 1 for the zero block",
    "fp8_channel/codes": "[out, in] uint8 e4m3fn; per_token_cast_to_fp8, divided by the scale",
    "fp8_channel/scale": "[out, 1] float32 = max(absmax, 1e-4) / 448",
    "kv": "[tokens=10, heads=2, head_dim=32] float32",
    "kv_<int8|fp8>/absmax": "[2, 32] (int8, per channel), [2, 1] (fp8, per head) float32, static; "
    "smaller than the largest |kv| in places, so that some values clip",
    "kv_int8/codes": "[10, 2, 32] uint8 = clip(rint(x * (127 / absmax)), -127, 127) + 128",
    "kv_fp8/codes": "[10, 2, 32] uint8 e4m3fn of clip(x * (448 / absmax), -448, 448)",
    "kv_<int8|fp8>/decoded": "[10, 2, 32] float32 = code * (absmax / bound)",
    "kv_fp8_dynamic/codes": "[10, 2, 32] uint8 e4m3fn of x * (448 / absmax of the token and head)",
    "kv_fp8_dynamic/scale": "[10, 2, 1] uint16 bits of bfloat16(1 / (448 / absmax))",
    "kv_int4/scale": "[2, 1] float32; kv_int4/zero [2, 1] float32",
    "kv_int4/codes": "[10, 2, 32] uint8 = clip(rint(x * (1/scale) + zero), -7, 7) + 8, not packed",
    "kv_int4/decoded": "[10, 2, 32] float32 = (code - 8 - zero) * scale",
    "wint2/quant_weight": "[k/4=64, n=128] uint8, random bytes; byte r holds rows 4r to 4r+3",
    "wint2/weight_scale": "[k/128=2, n] uint8: high nibble: even group of 64 rows, low: odd",
    "wint2/code_scale": "[n] float32; wint2/code_zp [n]; wint2/super_scales [n] uint16 bf16",
    "wint2/decoded": "[k=256, n=128] float32, exact",
}


def wint2_decode(byte, local, code_scale, code_zp, super_scale) -> np.ndarray:
    """FastDeploy's WINT2 as a scalar loop over its definition (wint2_fused_moe_kernel.py)."""
    k, n = 4 * byte.shape[0], byte.shape[1]
    w = np.zeros((k, n), np.float32)
    for column in range(n):
        a, b = float(code_scale[column]), float(code_zp[column])
        for row in range(k):
            state = math.floor(int(byte[row // 4, column]) * a + b + 0.5)
            value = ((state >> (9, 6, 3, 0)[row % 4]) & 0x3F) - 32
            shift = 4 if (row // 64) % 2 == 0 else 0
            scale = (int(local[row // 128, column]) >> shift) & 0xF
            w[row, column] = value * scale * float(super_scale[column])
    return w


def wint2_inputs() -> tuple[np.ndarray, ...]:
    """Random bytes; code scales for which no rounding of c * scale + zero can matter."""
    rng = rng_of("wint2")
    byte = rng.integers(0, 256, (64, 128), dtype=np.uint8)
    local = rng.integers(0, 256, (2, 128), dtype=np.uint8)
    code_scale, code_zp = np.ones(128, np.float32), np.zeros(128, np.float32)
    code_scale[1] = 128.0
    every = np.arange(256)
    for column in range(2, 128):
        while True:
            a, b = np.float32(rng.uniform(90, 124)), np.float32(rng.uniform(0, 1000))
            state = every * float(a) + float(b) + 0.5
            if (np.abs(state - np.round(state)) > 0.01).all() and state[-1] < 2**15:
                break
        code_scale[column], code_zp[column] = a, b
    super_scale = rng.uniform(1e-4, 1e-3, 128).astype(ml_dtypes.bfloat16)
    return byte, local, code_scale, code_zp, super_scale


def make_fastdeploy() -> None:
    """Weights as `block_wise_fp8` and `wfp8afp8` cast them, the KV formats, and WINT2."""
    rng = rng_of("fastdeploy")
    w = rng.standard_t(4, (136, 328)) * 0.03
    w[:128, 128:256] = 0
    w = torch.from_numpy(w.astype(np.float32))
    arrays = {"weight": w.numpy()}

    padded = torch.nn.functional.pad(w, (0, 384 - 328, 0, 256 - 136))
    blocks = padded.reshape(2, 128, 3, 128)
    peak = blocks.abs().amax((1, 3), keepdim=True)
    multiplier = torch.where(peak == 0, torch.ones_like(peak), 448.0 / peak)
    codes = to_e4m3(blocks * multiplier).reshape(padded.shape)[:136, :328]
    arrays["fp8_block/codes"] = bits(codes)
    arrays["fp8_block/scale"] = (1.0 / multiplier).reshape(2, 3).numpy()

    scale = torch.clamp(w.abs().amax(1, keepdim=True), min=1e-4) / 448.0
    arrays["fp8_channel/codes"] = bits(to_e4m3(w / scale))
    arrays["fp8_channel/scale"] = scale.numpy()

    kv = rng.standard_normal((10, 2, 32)) * np.exp2(rng.integers(-3, 3, (1, 2, 32)))
    x = torch.from_numpy(kv.astype(np.float32))
    arrays["kv"] = x.numpy()
    for name, peak in (("int8", x.abs().amax(0)), ("fp8", x.abs().amax((0, 2)).reshape(2, 1))):
        peak = peak * 0.9
        bound = {"int8": 127.0, "fp8": 448.0}[name]
        scaled = torch.clamp(x * (bound / peak), -bound, bound)
        if name == "int8":
            codes = torch.clamp(torch.round(x * (bound / peak)), -127, 127)
            arrays["kv_int8/codes"] = (codes + 128).to(torch.uint8).numpy()
        else:
            codes = to_e4m3(scaled)
            arrays["kv_fp8/codes"] = bits(codes)
        arrays[f"kv_{name}/absmax"] = peak.numpy()
        arrays[f"kv_{name}/decoded"] = (codes.float() * (peak / bound)).numpy()
    multiplier = 448.0 / x.abs().amax(-1, keepdim=True)
    arrays["kv_fp8_dynamic/codes"] = bits(to_e4m3(x * multiplier))
    arrays["kv_fp8_dynamic/scale"] = bits((1.0 / multiplier).to(torch.bfloat16))
    scale = x.abs().amax((0, 2)).reshape(2, 1) / 6.0
    zero = torch.tensor([[0.5], [-1.25]])
    codes = torch.clamp(torch.round(x * (1.0 / scale) + zero), -7, 7)
    arrays["kv_int4/scale"], arrays["kv_int4/zero"] = scale.numpy(), zero.numpy()
    arrays["kv_int4/codes"] = (codes + 8).to(torch.uint8).numpy()
    arrays["kv_int4/decoded"] = ((codes - zero) * scale).numpy()

    inputs = wint2_inputs()
    names = ("quant_weight", "weight_scale", "code_scale", "code_zp", "super_scales")
    for name, value in zip(names, inputs, strict=True):
        stored = value.view(np.uint16) if value.dtype == ml_dtypes.bfloat16 else value
        arrays[f"wint2/{name}"] = stored
    arrays["wint2/decoded"] = wint2_decode(*inputs)
    write("fastdeploy", ("torch",), FASTDEPLOY_KEYS, arrays)


def check_fastdeploy(arrays: dict) -> None:
    """Bounds every error, and decodes WINT2 a second time, vectorized."""
    w = arrays["weight"]
    scale = np.repeat(np.repeat(arrays["fp8_block/scale"], 128, axis=0), 128, axis=1)[:136, :328]
    assert arrays["fp8_block/scale"][0, 1] == 1
    for codes, step in (
        (arrays["fp8_block/codes"], scale),
        (arrays["fp8_channel/codes"], arrays["fp8_channel/scale"]),
    ):
        error = np.abs(E4M3[codes] * step - w)
        assert (error <= np.maximum(np.abs(w) * 2.0**-4, step * 2.0**-10) * 1.001).all()
    x = arrays["kv"]
    for name in ("int8", "fp8", "int4"):
        decoded = arrays[f"kv_{name}/decoded"]
        error = np.linalg.norm(decoded - x) / np.linalg.norm(x)
        assert 0 < error < (0.4 if name == "int4" else 0.08), (name, error)
    assert arrays["kv_int8/codes"].min() == 1 and arrays["kv_int8/codes"].max() == 255
    scale = arrays["kv_fp8_dynamic/scale"].view(ml_dtypes.bfloat16).astype(np.float32)
    error = E4M3[arrays["kv_fp8_dynamic/codes"]] * scale - x
    assert (np.abs(error) <= np.maximum(np.abs(x) * 0.07, scale * 2.0**-9)).all()
    byte = np.repeat(arrays["wint2/quant_weight"].astype(np.float64), 4, axis=0)
    state = np.floor(byte * arrays["wint2/code_scale"] + arrays["wint2/code_zp"] + 0.5).astype(int)
    row = np.arange(256)[:, None]
    value = ((state >> (9 - 3 * (row % 4))) & 63) - 32
    local = np.repeat(arrays["wint2/weight_scale"], 128, axis=0)
    local = np.where(row // 64 % 2 == 0, local >> 4, local & 15)
    super_scale = arrays["wint2/super_scales"].view(ml_dtypes.bfloat16).astype(np.float32)
    same((value * local).astype(np.float32) * super_scale, arrays["wint2/decoded"], "wint2")


MAKERS = {
    "casts": (make_casts, check_casts),
    "activations": (make_activations, check_activations),
    "fastdeploy": (make_fastdeploy, check_fastdeploy),
}

if __name__ == "__main__":
    main(MAKERS)
