"""Rows of every dtype times weights of every format: what is computed, and what comes out."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.formats.qtensor import dequantize
from tests.closeness import error
from tests.covering import slow_but
from tests.formats.cases import PRODUCTS, VARIED, quantized

WIDE = ("float32", "bfloat16", "float16")
COUNTED = ("int8", "uint8", "int32", "bool", "float8_e4m3fn", "float8_e5m2")


def rows(dtype, rng):
    values = rng.standard_normal((2, 256)) * 3
    if dtype in ("uint8", "bool"):
        values = np.abs(values)
    return values.astype(getattr(ml_dtypes, dtype, dtype))


@functools.cache
def products():
    def run(xs, q):
        with ops.forced_program("whole"):
            return {dtype: fdq.matmul(x, q) for dtype, x in xs.items()}

    return jax.jit(run)


@pytest.mark.parametrize("name", slow_but((*VARIED, "array"), [*PRODUCTS, "array"]))
def test_every_dtype_of_rows(name, rng):
    q = dequantize(quantized("int8")) if name == "array" else quantized(name)
    w = np.asarray(q if name == "array" else dequantize(q), np.float64)
    xs = {dtype: rows(dtype, rng) for dtype in (*WIDE, *COUNTED)}
    for dtype, y in products()(xs, q).items():
        expected = xs[dtype].astype(np.float64) @ w
        assert np.abs(expected).max() > 0
        if name == "array":  # of an array the wider dtype of the two
            assert y.dtype == (dtype if dtype in WIDE else "float32")
        assert y.dtype == (jnp.dtype(dtype) if dtype in WIDE else jnp.float32)
        # Of positive rows the sums of codes and those of offsets cancel.
        usual = 2e-6 if name.endswith("affine") else 1e-6
        limit = {"bfloat16": 4e-3, "float16": 5e-4}.get(dtype, usual)
        assert error(y, expected) < limit, dtype
    with pytest.raises(TypeError, match="complex"):
        fdq.matmul(jnp.ones((2, 256), jnp.complex64), q)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_weight_of_eight_bit_floats_counts_as_float32(dtype, rng):
    w = (rng.standard_normal((64, 24)) * 3).astype(getattr(ml_dtypes, dtype))
    for kind in ("float32", "bfloat16", dtype):
        x = rng.standard_normal((2, 64)).astype(getattr(ml_dtypes, kind, kind))
        y = fdq.matmul(jnp.asarray(x), jnp.asarray(w))
        assert y.dtype == ("bfloat16" if kind == "bfloat16" else "float32")
        expected = x.astype(np.float64) @ w.astype(np.float64)
        assert error(y, expected) < (4e-3 if kind == "bfloat16" else 1e-6)


@pytest.mark.parametrize("value", [[1.0, 2.0], "text", 1.0])
def test_what_is_no_array_is_refused(value):
    with pytest.raises(TypeError, match=f"expected an array x .*found a {type(value).__name__}"):
        fdq.matmul(value, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=f"or a float array w, found {type(value).__name__}"):
        fdq.matmul(jnp.ones(2), value)


def test_every_dtype_of_rows_over_the_columns_of_a_weight(rng):
    q = quantized("int4-g64")
    w = np.asarray(dequantize(q), np.float64)
    for dtype in (*WIDE, *COUNTED):
        x = (np.abs(rng.standard_normal((2, w.shape[1]))) * 3).astype(
            getattr(ml_dtypes, dtype, dtype)
        )
        y = fdq.einsum("mn,kn->mk", jnp.asarray(x), q)
        assert y.dtype == (jnp.dtype(dtype) if dtype in WIDE else jnp.float32)
        limit = {"bfloat16": 4e-3, "float16": 5e-4}.get(dtype, 1e-6)
        assert error(y, x.astype(np.float64) @ w.T) < limit, dtype
    with pytest.raises(TypeError, match=r"fdq\.einsum: expected x of real numbers, found complex"):
        fdq.einsum("mn,kn->mk", jnp.ones((2, w.shape[1]), jnp.complex64), q)


def test_numpy_rows_of_float64_are_what_jax_holds(rng):
    q, x = quantized("int4-g64"), rng.standard_normal((2, 256))
    y = fdq.matmul(x, q)  # warnings are errors here
    assert y.dtype == jnp.float32
    assert error(y, x @ np.asarray(dequantize(q), np.float64)) < 1e-6
