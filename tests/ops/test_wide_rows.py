"""Rows of float64, whose range float32 lacks: products and their derivatives keep it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.formats.qtensor import dequantize
from tests.closeness import error
from tests.covering import slow
from tests.formats.cases import quantized

SIZES = np.array([[1e300], [1.0], [3e-300], [0.0]])
ROWS = np.random.default_rng(5).standard_normal((4, 256))


def assert_rows_close(y, expected, limit=1e-6):
    assert y.dtype == jnp.float64 and np.isfinite(np.asarray(y)).all()
    for i in range(3):
        assert error(np.asarray(y[i]), expected[i]) < limit
    assert not np.any(np.asarray(y[3]))


@pytest.mark.parametrize("name", ["int4-g64", *map(slow, ("int8", "nf4-g64-dq", "nvfp4", "cc2"))])
@pytest.mark.parametrize("activation", [None, "int8", slow("fp8-x128")])
def test_products_keep_the_range_of_float64(name, activation):
    q = quantized(name)
    w = np.asarray(dequantize(q), np.float64)
    with jax.enable_x64(True):
        x, limit = jnp.asarray(ROWS * SIZES), 0.1 if activation else 1e-6
        assert_rows_close(fdq.matmul(x, q, activation=activation), (ROWS * SIZES) @ w, limit)
        if activation is None:
            assert_rows_close(jax.jit(jax.vmap(lambda row: row @ q))(x), (ROWS * SIZES) @ w)
            wide = jnp.asarray(np.ones((4, w.shape[1])) * SIZES)
            expected = np.asarray(wide) @ w.T
            assert_rows_close(fdq.einsum("mn,kn->mk", wide, q), expected)
            stack = jax.tree.map(lambda a: jnp.stack([a, a]), q)
            for index in ([0, 1, 1, 0], [[0, 1]] * 4):
                y = fdq.grouped_matmul(x, stack, jnp.asarray(index))
                y = y if y.ndim == 2 else y[:, 1]
                assert_rows_close(y, (ROWS * SIZES) @ w)


def test_derivatives_keep_the_range_of_float64():
    q = quantized("int4-g64")
    w = np.asarray(dequantize(q), np.float64)
    with jax.enable_x64(True):
        x = jnp.asarray(ROWS * SIZES)
        dy = jax.jvp(jax.jit(lambda x: fdq.matmul(x, q)), (x,), (x,))[1]
        assert_rows_close(dy, (ROWS * SIZES) @ w)
        g = jnp.asarray(np.ones((4, w.shape[1])) * SIZES)
        assert_rows_close(jax.vjp(lambda x: fdq.matmul(x, q), x)[1](g)[0], np.asarray(g) @ w.T)
        assert_rows_close(jax.linear_transpose(lambda x: x @ q, x)(g)[0], np.asarray(g) @ w.T)


def test_arrays_and_calibrated_scales_under_float64():
    with jax.enable_x64(True):
        w = np.random.default_rng(6).standard_normal((256, 8))
        x = jnp.asarray(ROWS * SIZES)
        assert_rows_close(fdq.matmul(x, jnp.asarray(w)), (ROWS * SIZES) @ w, 1e-12)
        # What is beyond a calibrated scale saturates, of any size.
        spec = fdq.ActivationSpec(format="int8", granularity="tensor", dynamic=False)
        q, scale = quantized("int8"), jnp.float32(0.1)
        huge, large = (jnp.asarray(ROWS * size) for size in (1e300, 1e30))
        found, expected = (
            fdq.matmul(x, q, activation=spec, activation_scale=scale) for x in (huge, large)
        )
        np.testing.assert_array_equal(found, expected)
        assert np.isfinite(np.asarray(found)).all()
