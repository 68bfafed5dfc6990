"""compat="fastdeploy-cpu" equals Paddle's CPU kernel bit for bit; "fastdeploy" its GPU formula."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fdq.formats import packing
from fdq.formats.qtensor import QTensor, dequantize
from fdq.quantizers import quantize_array
from fdq.quantizers.fastdeploy_rounding import round_half_away
from tests.formats.cases import spec
from tests.formats.oracles import fixture

DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def codes_of(q: QTensor) -> np.ndarray:
    if q.spec.format == "int8":
        return np.asarray(q.codes)
    return np.asarray(packing.unpack(q.codes, 4, q.padding)).astype(np.int8) - 8


def spec_of(format: str, group: int):
    return spec(format) if group == -1 else spec(format, group, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight", "format", "group"),
    [
        ("normal", "int8", -1),
        ("normal", "int4", -1),
        ("normal", "int8", 64),
        ("normal", "int4", 64),
        ("ties_int8", "int8", -1),
        ("ties_int8", "int8", 64),
        ("ties_int8", "int8", 128),
        ("ties_int4", "int4", -1),
        ("ties_int4", "int4", 64),
        ("ties_int4", "int4", 128),
    ],
)
def test_paddles_cpu_kernel(weight, format, group, dtype):
    a = fixture("paddle", f"{weight}/{dtype}")
    w = a["w"].view(DTYPES[dtype])
    codes = a[f"{format}_g{group}/codes"]
    scale = a[f"{format}_g{group}/scale"].view(DTYPES[dtype]).astype(np.float32)
    q = quantize_array(jnp.asarray(w), spec_of(format, group), compat="fastdeploy-cpu")
    # Paddle divides zero by zero in all-zero columns: arbitrary codes, times a scale of 0.
    real = np.repeat(scale, w.shape[0] // scale.shape[0], axis=0) != 0
    assert real.mean() > 0.9
    np.testing.assert_array_equal(codes_of(q)[real], codes[real])
    np.testing.assert_array_equal(np.asarray(q.scale)[scale != 0], scale[scale != 0])
    assert not np.any(np.asarray(dequantize(q))[~real])


@pytest.mark.parametrize(("format", "bound"), [("int8", 127.0), ("int4", 7.0)])
def test_the_gpu_kernel_divides_by_the_unrounded_absmax(format, bound, rng):
    w = rng.standard_normal((64, 256)).astype(ml_dtypes.bfloat16)
    q = quantize_array(jnp.asarray(w), spec(format), compat="fastdeploy")
    x = w.astype(np.float32)
    largest = np.abs(x).max(axis=0)
    scaled = x / largest * np.float32(bound)
    expected = np.sign(scaled) * np.floor(np.abs(scaled).astype(np.float64) + 0.5)
    np.testing.assert_array_equal(codes_of(q), np.clip(expected, -bound, bound))
    stored = (largest / np.float32(bound)).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(q.scale)[0], stored)
    assert q.scale.dtype == jnp.float32
    on_cpu = quantize_array(jnp.asarray(w), spec(format), compat="fastdeploy-cpu")
    assert np.any(codes_of(on_cpu) != codes_of(q)), "the sample must tell the kernels apart"
    assert np.abs(codes_of(on_cpu).astype(int) - codes_of(q)).max() == 1


def test_halves_go_away_from_zero():
    below = np.nextafter(np.float32(0.5), np.float32(0))
    x = jnp.asarray([0.5, -0.5, 1.5, 2.5, -2.5, below, -below, 3.0], jnp.float32)
    assert round_half_away(x).tolist() == [1, -1, 2, 3, -3, 0, 0, 3]


def test_what_fastdeploy_does_not_have_is_refused():
    w = jnp.ones((128, 4), jnp.bfloat16)
    with pytest.raises(ValueError, match="x: unknown compat 'paddle'"):
        quantize_array(w, spec("int8"), compat="paddle", path="x")
    with pytest.raises(ValueError, match=r"x: .*int8 and int4 without zero points, found nf4"):
        quantize_array(w, spec("nf4", 64), compat="fastdeploy", path="x")
    with pytest.raises(ValueError, match="drop method and importance"):
        quantize_array(w, spec("int8"), compat="fastdeploy", method="absmax")
    with pytest.raises(ValueError, match="would round again"):
        quantize_array(w.astype(jnp.float16), spec("int4", 64), compat="fastdeploy")
    with pytest.raises(ValueError, match="per channel or group"):
        quantize_array(w, spec("int8", granularity="tensor"), compat="fastdeploy")
    same = quantize_array(w, spec("int4", 64), compat="fastdeploy")
    assert same.scale.dtype == jnp.bfloat16
