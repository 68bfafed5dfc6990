"""What other libraries encoded decodes to what they decode: fdq's arrays mean the same numbers."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fdq.formats import FORMATS, packing
from fdq.formats.grouping import power_of_two
from fdq.formats.qtensor import QTensor, dequantize
from fdq.formats.small_float import E2M1
from tests.formats.cases import spec
from tests.formats.oracles import array, fixture

E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
BLOCK = {"granularity": "block", "block_size": (128, 128)}


def check(a: dict, s, *, scale, codes, rtol=0.0, padding=0, **fields):
    """Decodes ([out, in] turned to [in, out]) and compares with the library's own result."""
    fields = {name: jnp.asarray(value) for name, value in fields.items()}
    q = QTensor(codes=jnp.asarray(codes), scale=jnp.asarray(scale), spec=s, **fields)
    q = QTensor(**q.arrays(), spec=s, padding=padding)
    expected = a["decoded"].T
    assert q.shape == expected.shape
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(np.asarray(dequantize(q)), expected, rtol=rtol, atol=0)
    return q


def int4_rows(a: dict) -> np.ndarray:
    """compressed-tensors' int32 words along `in` -> packed bytes [in / 2, out]."""
    return np.ascontiguousarray(a["weight_packed"].view(np.uint8).T)


@pytest.mark.parametrize("weight", ["normal", "student"])
def test_int4_groups(weight):
    a = fixture("compressed_tensors", f"{weight}/int4_g128")
    check(a, spec("int4", 128, "float32"), scale=a["weight_scale"].T, codes=int4_rows(a))


def test_int4_channel():
    a = fixture("compressed_tensors", "odd/int4_channel")
    check(a, spec("int4"), scale=a["weight_scale"].T, codes=int4_rows(a))


@pytest.mark.parametrize(
    ("key", "s"),
    [
        ("student/int4_g128_asym", spec("int4", 128, "float32", zero_point="integer")),
        ("odd/int4_channel_asym", spec("int4", zero_point="integer")),
    ],
)
def test_int4_with_zero_points(key, s):
    a = fixture("compressed_tensors", key)
    n = a["decoded"].shape[0]
    words = a["weight_zero_point"]  # packed along `out`
    zeros = np.stack([(words[i // 8] >> (4 * (i % 8))) & 15 for i in range(n)])
    check(a, s, scale=a["weight_scale"].T, codes=int4_rows(a), zero=zeros.T.astype(np.uint8))


@pytest.mark.parametrize("key", ["normal", "student", "odd"])
def test_int8_channel(key):
    a = fixture("compressed_tensors", f"{key}/int8_channel")
    check(a, spec("int8"), scale=a["weight_scale"].T, codes=a["weight"].T)


@pytest.mark.parametrize(
    ("key", "s"),
    [
        ("normal/fp8_channel", spec("float8_e4m3")),
        ("odd/fp8_channel", spec("float8_e4m3")),
        ("student/fp8_tensor", spec("float8_e4m3", granularity="tensor")),
        ("normal/fp8_block", spec("float8_e4m3", **BLOCK)),
        ("student/fp8_block", spec("float8_e4m3", **BLOCK)),
        ("odd/fp8_block", spec("float8_e4m3", **BLOCK)),
    ],
)
def test_fp8(key, s):
    a = fixture("compressed_tensors", key)
    scale = a["weight_scale"].reshape(1, -1) if a["weight_scale"].ndim == 1 else a["weight_scale"].T
    check(a, s, scale=scale, codes=a["weight"].view(E4M3).T)


@pytest.mark.parametrize("key", ["normal", "student"])
def test_nvfp4(key):
    a = fixture("compressed_tensors", f"{key}/nvfp4")
    check(
        a,
        spec("nvfp4", 16, "float8_e4m3fn"),
        scale=a["weight_scale"].view(E4M3).T,
        codes=a["weight_packed"].T,
        global_scale=1 / a["weight_global_scale"].reshape(1, 1),  # theirs divides
        rtol=3e-7,
    )


@pytest.mark.parametrize("key", ["normal", "student"])
def test_mxfp4_and_mxfp8(key):
    a = fixture("compressed_tensors", f"{key}/mxfp4")
    four = spec("mxfp4", 32, "float8_e8m0fnu")
    check(a, four, scale=a["weight_scale"].view(E8M0).T, codes=a["weight_packed"].T)
    a = fixture("compressed_tensors", f"{key}/mxfp8")
    eight = spec("mxfp8", 32, "float8_e8m0fnu")
    check(a, eight, scale=a["weight_scale"].view(E8M0).T, codes=a["weight"].view(E4M3).T)


@pytest.mark.parametrize("case", ["nf4", "nf4_double"])
def test_nf4(case):
    """bitsandbytes: flat, high nibble first, blocks of 64."""
    a = fixture("bitsandbytes", f"normal/{case}")
    n, k = a["decoded"].shape
    flat = a["weight"].ravel()
    codes = np.stack([flat >> 4, flat & 15], axis=1).reshape(n, k).T
    absmax = a["absmax"].astype(np.float32)
    if case == "nf4_double":
        state = json.loads(a["quant_state.bitsandbytes__nf4"].tobytes())
        block = np.arange(absmax.size) // state["nested_blocksize"]
        absmax = a["nested_quant_map"][a["absmax"]] * a["nested_absmax"][block]
        absmax = absmax + np.float32(state["nested_offset"])
    packed = packing.pack(jnp.asarray(np.ascontiguousarray(codes)), 4)
    scale = absmax.reshape(n, k // 64).T.astype(np.float32)
    q = check(a, spec("nf4", 64, "float32"), scale=scale, codes=packed)
    if case == "nf4":  # and encoding: their codes, from their weight
        w = fixture("bitsandbytes", "normal")["weight"].T
        found = FORMATS["nf4"].encode(jnp.asarray(w), q.spec)
        np.testing.assert_array_equal(np.asarray(found["codes"]), np.asarray(packed))
        np.testing.assert_array_equal(np.asarray(found["scale"]), scale)


@pytest.mark.parametrize("case", ["fp8_block", "fp8_channel"])
def test_fastdeploy_fp8(case):
    """FastDeploy's own weights: block-wise FP8 and WFP8AFP8, [out, in]."""
    w = array("fastdeploy", "weight")
    a = fixture("fastdeploy", case)
    s = spec("float8_e4m3", **BLOCK) if case == "fp8_block" else spec("float8_e4m3")
    found = FORMATS["float8_e4m3"].encode(jnp.asarray(w.T), s)
    np.testing.assert_allclose(np.asarray(found["scale"]), a["scale"].T, rtol=2e-7)
    same = np.asarray(found["codes"]).view(np.uint8) == a["codes"].T
    # FastDeploy multiplies by 1 / scale where fdq divides: a code in ten thousand may differ.
    assert same.mean() > 0.999
    step = np.asarray(found["codes"]).view(np.uint8).astype(int) - a["codes"].T.astype(int)
    assert np.abs(step).max() <= 1


@pytest.mark.parametrize(("name", "library"), [("e4m3fn", "float8_e4m3"), ("e5m2", "float8_e5m2")])
def test_saturating_casts_equal_torch(name, library):
    x = array("casts", "x")
    format, s = FORMATS[library], spec(library)
    levels = format.project(jnp.asarray(x), s)
    codes = np.asarray(format.to_codes(levels, s, None)).view(np.uint8)
    keep = np.isfinite(x)
    np.testing.assert_array_equal(codes[keep], array("casts", f"torch/{name}_saturated")[keep])
    decoded = np.arange(256, dtype=np.uint8).view(format.element.dtype)
    np.testing.assert_array_equal(
        np.asarray(format.from_codes(jnp.asarray(decoded), s, None)),
        array("casts", f"decode/{name}"),
    )


def test_e2m1_and_e8m0_decode_as_defined():
    table = array("casts", "decode/e2m1")
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(np.asarray(E2M1.from_codes(codes)), table)
    positive = np.asarray(E2M1.to_codes(jnp.asarray(table)))
    np.testing.assert_array_equal(np.delete(positive, 8), np.delete(np.arange(16), 8))
    exponents = jnp.arange(-126, 128)
    np.testing.assert_array_equal(
        np.asarray(power_of_two(exponents)), array("casts", "decode/e8m0fnu")[1:255]
    )
