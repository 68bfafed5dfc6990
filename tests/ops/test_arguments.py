"""Arguments of products that mean nothing are refused by name; what is large stays finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq


@pytest.fixture
def q(rng):
    return fdq.quantize(rng.standard_normal((64, 32)).astype("float32"), "W8A16")


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("activation", ["int8-static", "fp8-static"])
def test_a_static_scale_is_a_positive_number(scale, activation, q):
    with pytest.raises(ValueError, match="activation_scale=.*; expected finite numbers above 0"):
        fdq.matmul(jnp.ones((2, 64)), q, activation=activation, activation_scale=scale)


def test_a_static_activation_that_saw_only_zeros_is_refused():
    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.linear(x)

    net = Net()
    calibration = fdq.calibrate(net, np.zeros((2, 64), "float32"))
    for given in (calibration, {"linear": 0.0}):
        with pytest.raises(ValueError, match=r"linear.kernel: its input was 0 throughout"):
            fdq.quantize(net, "W8A8-static", calibration=given)
    found = fdq.quantize(net, "W8A8-static", calibration={"linear": 2.0})
    assert np.isfinite(found(jnp.ones((1, 64)))).all()


@pytest.mark.parametrize("scheme", ["WMXFP4A16", "WNVFP4A16", "WNF4A16", "Wfp8A16", "W4A16"])
@pytest.mark.parametrize("size", [1e30, 1e36, 8e37])
def test_large_weights_are_multiplied_or_refused(scheme, size, rng):
    """What may be quantized, products and rows can use: no scale overflows on the way."""
    w = np.clip(rng.standard_normal((128, 16)) / 4, -1, 1).astype("float32")
    w[0, 0] = 1.0
    try:
        q = fdq.quantize(w * np.float32(size), scheme)
    except ValueError as error:
        assert "beyond" in str(error) or "range" in str(error) or "large" in str(error)
        return
    x = np.eye(128, dtype="float32") * np.float32(1e-3)
    wanted = np.asarray(fdq.dequantize(q), np.float64) * 1e-3
    for weight in (q, fdq.prepare(q)):
        found = np.asarray(fdq.matmul(x, weight), np.float64)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
        assert np.isfinite(fdq.take(weight, np.arange(128))).all()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x, q: fdq.matmul(x, q, activation=5), TypeError, "activation=5: expected an Act"),
        (lambda x, q: fdq.matmul(x, q, out_dtype="x"), TypeError, "out_dtype='x'; expected"),
        (lambda x, q: fdq.matmul(x, q, out_dtype="int8"), TypeError, "out_dtype='int8'; expected"),
        (lambda x, q: fdq.matmul(x.astype(object), q), TypeError, "real numbers, found object"),
        (lambda x, q: fdq.einsum("bk,kn->bn", x.tolist(), q), TypeError, "found a list"),
        (lambda x, q: fdq.einsum("kn,bk->bn", q, x), TypeError, "is the second operand"),
        (
            lambda x, q: fdq.einsum("bk,kn->bn", x, np.ones((64, 32), "f4"), activation="int8"),
            ValueError,
            "activation= is for quantized weights",
        ),
        (
            lambda x, q: fdq.einsum("bn,kn->bk", x[:, :32], q, activation="int8"),
            ValueError,
            "activation= is for products over K",
        ),
    ],
)
def test_what_means_nothing_is_refused_by_name(call, error, said, q):
    with pytest.raises(error, match=said):
        call(np.ones((2, 64), "float32"), q)


def test_einsum_takes_arrays_of_any_floats(rng):
    x = rng.standard_normal((2, 64)).astype("float32")
    w = rng.standard_normal((64, 32)).astype("float32")
    narrow = jnp.asarray(x, jnp.float8_e4m3fn)
    found = fdq.einsum("bk,kn->bn", narrow, w)
    np.testing.assert_allclose(found, narrow.astype(jnp.float32) @ w, rtol=1e-5, atol=1e-5)
    assert fdq.einsum("bk,kn->bn", x, w, out_dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize("scheme", ["WMXFP4", "WNVFP4", "Wfp8", "Wfp8-b64"])
@pytest.mark.parametrize("name", ["codes", "scale"])
def test_8_bit_floats_have_no_derivative_through_rows_either(scheme, name, rng):
    q = fdq.quantize(rng.standard_normal((64, 64)).astype("float32"), scheme)
    if getattr(q, name).dtype.itemsize > 1 or getattr(q, name).dtype == jnp.uint8:
        pytest.skip("these are no 8-bit floats")
    x = jnp.ones((3, 64))
    for use in (
        lambda q: fdq.take(q, jnp.array([1, 5])),
        lambda q: fdq.einsum("bn,kn->bk", x, q),
    ):
        with pytest.raises(TypeError, match=f"The {name} of this QTensor"):
            jax.grad(lambda a, use=use: use(q.replace(**{name: a})).sum())(getattr(q, name))


def test_a_variable_in_the_place_of_a_weight_is_asked_for_its_value(q, rng):
    """Own modules read raw parameters as Flax's do."""
    x = rng.standard_normal((2, 64)).astype("float32")
    for same in (q.value, q.get_value()):
        np.testing.assert_array_equal(x @ same, x @ q)


def test_a_kernel_out_in_is_no_array_of_objects(rng):
    w = rng.standard_normal((32, 64)).astype("float32")
    tree = fdq.quantize({"w": w}, [("w", "W8A16", {"contract": np.int64(1)})])
    folded = tree["w"]
    with pytest.raises(TypeError, match="is no array of numbers: decode it"):
        np.asarray(folded)
    with pytest.raises(ValueError, match=r"expected x \[64\] or \[64, M\], found \[2, 64, 3\]"):
        folded @ np.ones((2, 64, 3), "float32")
    for use in (
        lambda: fdq.einsum("bk,nk->bn", np.ones((2, 64), "f4"), folded),
        lambda: fdq.take(folded, [0]),
    ):
        with pytest.raises(TypeError, match=r"use the QTensor w.q \[..., K, N\]"):
            use()
    assert folded.size == 2048
    assert folded.bits_per_weight == folded.q.bits_per_weight
