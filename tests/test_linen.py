import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq.linen
from fdq.formats.qtensor import QTensor
from fdq.quantizers.quantization import quantize


class Net(flax.linen.Module):
    """A user's Linen model: attention, a convolution, batch statistics, dense layers."""

    sizes: tuple = (32, 16)

    @flax.linen.compact
    def __call__(self, x, train: bool = False):
        x = flax.linen.MultiHeadDotProductAttention(num_heads=4, name="attention")(x, x)
        x = flax.linen.Conv(64, kernel_size=(3,), name="conv")(x)
        x = flax.linen.BatchNorm(use_running_average=not train, name="norm")(x)
        for size in self.sizes:
            x = jax.nn.relu(flax.linen.Dense(size)(x))
        return flax.linen.Dropout(0.5, deterministic=not train)(x)

    def head(self, x):
        return x * 2.0


X = np.linspace(-1.0, 1.0, 2 * 6 * 64, dtype=np.float32).reshape(2, 6, 64)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net().init)(jax.random.key(0), X)


@pytest.fixture(scope="module")
def qvariables(variables):
    return quantize(variables, "W8A16")


def test_one_line_quantizes_and_applies(variables, qvariables):
    params = qvariables["params"]
    assert isinstance(params["Dense_0"]["kernel"], QTensor)
    assert params["conv"]["kernel"] is variables["params"]["conv"]["kernel"]
    y = fdq.linen.apply(Net(), qvariables, X)
    decoded = fdq.linen.dequantize_tree(qvariables)
    expected = jax.jit(Net().apply)(decoded, X)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    original = np.asarray(jax.jit(Net().apply)(variables, X))
    assert 0 < np.linalg.norm(y - original) < 0.02 * np.linalg.norm(original)
    # It works inside the user's own jit, and on the params alone.
    again = jax.jit(lambda q, x: fdq.linen.apply(Net(), q, x))(qvariables, X)
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-6)


def test_what_was_left_is_said(variables, capsys):
    quantize(variables, "W8A16", verbose=True)
    printed = capsys.readouterr().out
    assert "Quantized 2 of" in printed
    for text in ("conv.kernel", "attention.query.kernel", "3-D: needs a rule that names it"):
        assert text in printed
    rules = {"attention.out": "W8", "*": "W8"}  # [heads, head_dim, features]: a stack of heads
    q = quantize(variables, rules)
    assert q["params"]["attention"]["out"]["kernel"].shape == (4, 16, 64)


def test_static_arguments_rngs_mutable_and_method(qvariables):
    y, updated = fdq.linen.apply(
        Net(),
        qvariables,
        X,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(1)},
    )
    assert float(jnp.mean(y == 0)) > 0.3
    assert "batch_stats" in updated
    assert fdq.linen.apply(Net(), qvariables, X, method="head").shape == X.shape


def test_params_alone_and_modules_that_cannot_be_hashed():
    dense = flax.linen.Dense(8)
    params = dense.init(jax.random.key(0), X)["params"]
    q = quantize(params, "W4A16-g32")
    assert fdq.linen.apply(dense, q, X).shape == (2, 6, 8)
    half = flax.linen.Dense(8, dtype=jnp.bfloat16)
    assert fdq.linen.apply(half, q, X, weight_dtype=jnp.bfloat16).dtype == jnp.bfloat16

    class Listed(flax.linen.Module):
        table: np.ndarray

        @flax.linen.compact
        def __call__(self, x):
            return flax.linen.Dense(8)(x) + self.table[None, None]

    listed = Listed(np.ones(8, np.float32))
    q = quantize(listed.init(jax.random.key(0), X), "W8")
    assert fdq.linen.apply(listed, q, X).shape == (2, 6, 8)


def test_wrong_arguments_are_named(variables):
    with pytest.raises(TypeError, match="expected a Linen module first, found dict"):
        fdq.linen.apply(variables, Net(), X)
    with pytest.raises(TypeError, match="variables or params, found ndarray"):
        fdq.linen.apply(Net(), X, variables)
    with pytest.raises(TypeError, match="An NNX module needs no apply"):
        fdq.linen.apply(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), variables, X)


def test_memory_at_rest_shrinks(variables, qvariables):
    dense, qdense = (v["params"]["Dense_0"]["kernel"] for v in (variables, qvariables))
    assert qdense.nbytes < 0.3 * dense.nbytes
