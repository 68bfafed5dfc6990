"""Rows of every dtype, by weights of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.ops.choice import Target
from fdq.ops.matmul.xla import compute_dtype
from tests.closeness import error
from tests.covering import slow
from tests.formats.cases import quantized
from tests.ops.products import TOLERANCE, decoded, rows


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_activations_are_summed_in_float32(dtype, rng):
    q, x = quantized("int4-g64"), rows(rng, 2).astype(dtype)
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ decoded("int4-g64")
    assert fdq.matmul(x, q).dtype == dtype
    assert error(fdq.matmul(x, q, out_dtype=jnp.float32), expected) < TOLERANCE


ODD_DTYPES = ["int8", "uint8", "int32", "bool", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", ODD_DTYPES)
@pytest.mark.parametrize("kind", ["int4-g64", slow("fp8-block"), "array"])
def test_rows_that_are_no_wide_floats_count_as_float32(kind, dtype, rng):
    w = rows(rng, 256, 24) if kind == "array" else quantized(kind)
    x = jnp.asarray(rng.integers(-3, 4, (2, 256)), jnp.float32).astype(dtype)
    expected = np.asarray(x, np.float64) @ (np.asarray(w) if kind == "array" else decoded(kind))
    assert np.abs(expected).max() > 1
    for function in (fdq.matmul, jax.jit(fdq.matmul)):
        y = function(x, w)
        assert y.dtype == jnp.float32 and error(y, expected) < TOLERANCE
    assert fdq.matmul(x, w, out_dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ODD_DTYPES)
def test_rows_of_experts_that_are_no_wide_floats_count_as_float32(dtype, rng):
    q = jax.tree.map(lambda a: jnp.stack([a, a]), quantized("int8"))
    x = jnp.asarray(rng.integers(-3, 4, (2, 256)), jnp.float32).astype(dtype)
    y = fdq.grouped_matmul(x, q, jnp.asarray([1, 0]))
    expected = np.asarray(x, np.float64) @ decoded("int8")
    assert y.dtype == jnp.float32 and error(y, expected) < TOLERANCE


def test_dtypes_without_a_product_are_refused(rng):
    q, x = quantized("int4-g64"), rows(rng, 2)
    with pytest.raises(TypeError, match="expected x of real numbers, found complex64"):
        fdq.matmul(x.astype(jnp.complex64), q)
    for dtype in (jnp.int8, jnp.complex64, jnp.bool_):
        with pytest.raises(TypeError, match=f"or a float array w, found {jnp.dtype(dtype)}"):
            fdq.matmul(x, jnp.ones((256, 3), dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("m", [1, 3])
def test_array_weights(dtype, m, rng):
    x, w = rows(rng, m).astype(dtype), rows(rng, 256, 24).astype(dtype)
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(
        w.astype(jnp.float32), np.float64
    )
    assert error(fdq.matmul(x, w, out_dtype=jnp.float32), expected) < TOLERANCE
    gradient = jax.grad(lambda w: fdq.matmul(x, w).astype(jnp.float32).sum())(w)
    by_hand = np.repeat(np.asarray(x.astype(jnp.float32)).sum(0)[:, None], 24, axis=1)
    assert error(gradient.astype(jnp.float32), by_hand) < (1e-6 if dtype == jnp.float32 else 1e-2)


def test_compute_dtype_of_old_gpus():
    old, new = Target("gpu", has_bfloat16=False), Target("gpu", has_bfloat16=True)
    assert compute_dtype(jnp.bfloat16, old) == jnp.float16
    assert compute_dtype(jnp.bfloat16, new) == jnp.bfloat16
    assert compute_dtype(jnp.float32, old) == jnp.float32


@pytest.mark.parametrize("name", ["int4-g64", "fp8"])
def test_float16_takes_outliers_of_bfloat16(name, rng):
    """Activations beyond 65504 are legal in bfloat16, on GPUs that compute it in float16 too."""
    from fdq.ops.matmul.weight_only import plane_product
    from fdq.ops.weight_view import view_weight

    x = rows(rng, 3).at[0, 7].set(3e5).at[1].set(0.0).astype(jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ decoded(name)
    y = plane_product(x, view_weight(quantized(name)), jnp.float16)
    assert error(y[0], expected[0]) < 1e-3 and error(y[2], expected[2]) < 1e-3
    assert not y[1].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_transposed_array(dtype, rng):
    """A tied embedding: the same product without forming the transpose."""
    x, w = rows(rng, 1).astype(dtype), rows(rng, 24).astype(dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert error(ops.transposed_matmul(x, w, out_dtype=jnp.float32), expected) < TOLERANCE
