"""Training through the rounding: values are those of quantized weights, derivatives their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import fdq
from tests.closeness import assert_close
from tests.covering import slow


@pytest.fixture
def w(rng):
    return jnp.asarray(rng.standard_normal((128, 24)), jnp.float32)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", slow("WNF4A16"), slow("WMXFP4A16"),
                                    slow("WNVFP4A16"), slow("WCC2A16"), slow("Wfp8A16"),
                                    slow("W2A16-asym"), slow("Wfp8A16-b128")])  # fmt: skip
def test_values_and_derivatives(scheme, w, rng):
    expected = fdq.dequantize(fdq.quantize(w, scheme))
    assert np.array_equal(fdq.fake_quant(w, scheme), expected)
    assert not np.array_equal(expected, w)
    g = jnp.asarray(rng.standard_normal(w.shape), jnp.float32)
    value, back = jax.vjp(jax.jit(lambda w: fdq.fake_quant(w, scheme)), w)
    assert_close(value, expected, of_largest=1e-6)
    assert np.array_equal(back(g)[0], g)
    assert np.array_equal(jax.jvp(lambda w: fdq.fake_quant(w, scheme), (w,), (g,))[1], g)


def test_dtypes_stacks_and_shapes_alone(w):
    small = fdq.fake_quant(w.astype(jnp.bfloat16), "W8A16")
    assert small.dtype == jnp.bfloat16
    stack = jnp.stack([w, 2 * w])
    assert np.array_equal(fdq.fake_quant(stack, "W8A16")[1], fdq.fake_quant(2 * w, "W8A16"))
    shape = fdq.fake_quant(jax.ShapeDtypeStruct((128, 24), jnp.bfloat16), "W4A16")
    assert (shape.shape, shape.dtype) == ((128, 24), jnp.bfloat16)


def test_trees_and_modules(rng):
    x = jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)
    module = linen.Dense(32)
    params = module.init(jax.random.key(0), x)
    found = fdq.fake_quant(params, "W8A16")
    expected = fdq.linen.dequantize_tree(fdq.quantize(params, "W8A16"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    gradient = jax.grad(lambda p: module.apply(fdq.fake_quant(p, "W8A16"), x).sum())(params)
    by_hand = np.broadcast_to(np.asarray(x).sum(0)[:, None], (64, 32))
    assert_close(gradient["params"]["kernel"], by_hand, of_largest=1e-6)
    assert np.array_equal(gradient["params"]["bias"], np.full(32, 4.0))

    layers = nnx.List([nnx.LinearGeneral(64, (2, 16), rngs=nnx.Rngs(0))])
    new = fdq.fake_quant(layers, "W4A16-g32")
    quantized = fdq.quantize(layers, "W4A16-g32")
    assert_close(new[0](x), quantized[0](x), of_largest=1e-6)
    assert not np.array_equal(new[0].kernel[...], layers[0].kernel[...])


@pytest.mark.slow
def test_training_finds_weights_that_survive_two_bits(rng):
    """A product of two layers: rounding after training costs more than training through it."""
    x = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    target = jnp.sin(x @ jnp.asarray(rng.standard_normal((32, 8)), jnp.float32))
    shapes = {"up": {"kernel": (32, 64)}, "down": {"kernel": (64, 8)}}
    start = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s) / 6, jnp.float32), shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )  # fmt: skip

    def error(params):
        y = jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
        return ((y - target) ** 2).mean()

    def rounded(params):
        return fdq.fake_quant(params, "W2A16-g32", method="absmax")

    optimizer = optax.adam(2e-2)

    def trained(loss):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        carry = (start, optimizer.init(start))
        return jax.jit(lambda c: jax.lax.scan(step, c, None, length=150)[0])(carry)[0]

    with jax.numpy_dtype_promotion("standard"):  # optax has numbers of both kinds
        plain = error(rounded(trained(error)))
        through = error(rounded(trained(lambda params: error(rounded(params)))))
    assert through < 0.7 * plain


def test_what_is_refused(w):
    with pytest.raises(ValueError, match="Unknown quantization scheme"):
        fdq.fake_quant(w, "W5Q")
    with pytest.raises(ValueError, match="NaN or infinite"):
        fdq.fake_quant(w.at[0, 0].set(jnp.nan), "W4A16")
    assert np.isnan(jax.jit(lambda w: fdq.fake_quant(w, "W4A16"))(w.at[0, 0].set(jnp.nan))).any()
    with pytest.raises(ValueError, match="float weight"):
        fdq.fake_quant(jnp.ones((8, 8), jnp.int32), "W4A16")
