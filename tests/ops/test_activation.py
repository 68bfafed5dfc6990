"""Products with quantized activations equal their integer or float8 definition."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.formats.qtensor import dequantize
from fdq.ops import preparation
from fdq.schemes.scheme import ActivationSpec
from tests.closeness import error
from tests.covering import slow
from tests.formats.cases import quantized

INT8 = ActivationSpec(format="int8")
FP8 = ActivationSpec(format="float8_e4m3")
FP8_BLOCK = ActivationSpec(format="float8_e4m3", granularity="token_group", group_size=128)
ROUNDING = 1e-6


def rows(rng, m, k=256):
    x = rng.standard_normal((m, k)) * np.exp(rng.standard_normal((m, 1)))
    return jnp.asarray(x, jnp.float32)


def reference_codes(x, spec, scale=None):
    """Codes and the scale of every element from the definition.

    The scale is the op's own (``test_codes`` checks it): XLA divides by a constant to within a last
    bit, which may move a code that lies between two.
    """
    bound = np.float32(127 if spec.format == "int8" else 448)
    if scale is None:
        scale = np.asarray(ops.quantize_activation(x, spec)[1])
        scale = np.repeat(scale, x.shape[-1] // scale.shape[-1], axis=-1)
    y = np.clip(np.asarray(x, np.float32) / np.float32(scale), -bound, bound)
    if spec.format == "int8":
        return np.rint(y).astype(np.int64), scale
    return y.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), scale


@pytest.mark.parametrize("spec", [INT8, FP8, FP8_BLOCK], ids=["int8", "fp8", "fp8_block"])
def test_codes(spec, rng):
    x = rows(rng, 5).at[2].set(0.0)
    codes, scale = ops.quantize_activation(x, spec)
    expected, _ = reference_codes(x, spec)
    assert (np.asarray(codes).astype(np.float64) == expected).all()
    bound = 127 if spec.format == "int8" else 448
    assert np.abs(expected).max() == bound
    split = np.abs(np.asarray(x, np.float64)).reshape(5, scale.shape[-1], -1)
    np.testing.assert_allclose(scale, np.maximum(split.max(-1), 1e-10) / bound, rtol=2e-7)


@pytest.mark.parametrize("m", [1, 4])
def test_w8a8_is_an_integer_product(m, rng, monkeypatch):
    """int32 sums are exact, then two float32 products: equal to the last bit but one."""
    monkeypatch.setattr(preparation, "cpu_class", lambda: "amx")
    q, x = quantized("int8"), rows(rng, m)
    codes, scale = reference_codes(x, INT8)
    sums = codes @ np.asarray(q.codes).astype(np.int64)
    expected = sums.astype(np.float32) * np.asarray(q.scale) * scale[:, :1]
    for w in (q, ops.prepare(q, "cpu")):
        y = np.asarray(fdq.matmul(x, w, activation="int8"))
        np.testing.assert_allclose(y, expected, rtol=3e-7)


@pytest.mark.parametrize("m", [1, slow(4)])
@pytest.mark.parametrize(
    "name", ["int4-channel", "int4-g64", "int4-g32-asym", "int3-g64", "int2-g32-half"]
)
def test_integer_weights_and_int8(name, m, rng):
    q, x = quantized(name), rows(rng, m)
    codes, scale = reference_codes(x, INT8)
    levels = _levels(q)
    wide = np.repeat(np.asarray(q.scale, np.float64), 256 // q.scale.shape[0], axis=0)
    expected = codes @ (levels * wide) * scale[:, :1]
    assert error(fdq.matmul(x, q, activation=INT8), expected) < ROUNDING


def _levels(q):
    """code - zero of an integer weight, from its decoded values; integers, or odd halves."""
    wide = np.repeat(np.asarray(q.scale, np.float64), q.shape[0] // q.scale.shape[0], axis=0)
    levels = np.asarray(dequantize(q), np.float64) / wide
    rounded = np.round(levels * 2) / 2
    assert np.abs(levels - rounded).max() < 1e-5
    return rounded


@pytest.mark.parametrize("m", [slow(1), 4])
@pytest.mark.parametrize(
    "name, spec",
    [
        ("fp8", FP8),  # Wfp8Afp8
        ("int4-g64", FP8),  # W4Afp8
        ("fp8-block", FP8_BLOCK),  # block-wise FP8
        ("nf4-g64", INT8),  # WNF4A8
        ("mxfp4", FP8),
    ],
)
def test_float8_products(name, spec, m, rng):
    """Code values times decoded weights, scaled per token (and per slice of K)."""
    q, x = quantized(name), rows(rng, m)
    codes, scale = reference_codes(x, spec)
    expected = (codes * scale) @ np.asarray(dequantize(q), np.float64)
    assert error(fdq.matmul(x, q, activation=spec), expected) < ROUNDING


def test_block_wise_fp8_slice_by_slice(rng):
    """The definition that FastDeploy's GEMM has: a float32 sum per 128 rows times sA * sW."""
    q, x = quantized("fp8-block"), rows(rng, 3)
    codes, scale = reference_codes(x, FP8_BLOCK)
    weights = np.asarray(q.codes).astype(np.float64)
    expected = 0.0
    for i in range(2):
        k = slice(128 * i, 128 * (i + 1))
        block_scale = np.repeat(np.asarray(q.scale)[i], 128)
        expected = expected + codes[:, k] @ weights[k] * scale[:, k][:, :1] * block_scale
    assert error(fdq.matmul(x, q, activation="fp8-x128"), expected) < ROUNDING


@pytest.mark.parametrize("format", ["int8", "float8_e4m3"])
def test_static_scale(format, rng):
    spec = ActivationSpec(format=format, granularity="tensor", dynamic=False)
    q, x = quantized("int8"), rows(rng, 3)
    scale = np.float32(np.abs(x).max() / 200)
    codes, _ = reference_codes(x, spec, scale)
    expected = codes * scale @ np.asarray(dequantize(q), np.float64)
    y = fdq.matmul(x, q, activation=spec, activation_scale=jnp.asarray([scale]))
    assert error(y, expected) < ROUNDING
    with pytest.raises(ValueError, match="needs activation_scale, found None"):
        fdq.matmul(x, q, activation=spec)
    with pytest.raises(ValueError, match="activation_scale is given but"):
        fdq.matmul(x, q, activation="int8", activation_scale=jnp.asarray(1.0))


def test_the_gradient_is_straight_through(rng):
    q, x = quantized("int4-g64"), rows(rng, 2)
    gradient = jax.grad(lambda x: fdq.matmul(x, q, activation="int8").sum())(x)
    expected = np.broadcast_to(np.asarray(dequantize(q), np.float64).sum(1), x.shape)
    assert error(gradient, expected) < 5e-6
    array = jnp.asarray(dequantize(q))
    assert error(jax.grad(lambda x: fdq.matmul(x, array, activation="fp8").sum())(x), expected) < (
        5e-6
    )


def test_integer_dots_are_integer_dots(monkeypatch):
    """No float product of the weight anywhere: the dot of W8A8 takes int8 and gives int32."""
    monkeypatch.setattr(preparation, "cpu_class", lambda: "amx")
    q = quantized("int8")
    text = jax.jit(lambda x, q: fdq.matmul(x, q, activation="int8")).lower(
        jnp.ones((4, 256)), ops.prepare(q, "cpu")
    )
    dots = [line for line in text.as_text().splitlines() if "dot_general" in line]
    assert len(dots) == 1 and "xi8>" in dots[0] and "xi32>" in dots[0]


def test_unknown_activation():
    with pytest.raises(ValueError, match="int5"):
        fdq.matmul(jnp.ones((1, 256)), quantized("int8"), activation="int5")
