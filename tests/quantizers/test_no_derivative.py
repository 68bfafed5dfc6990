"""Derivatives through quantizing are refused in both modes, and the straight-through ones taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.quantizers.no_derivative import without_derivative
from tests.covering import slow

SCHEMES = ["W4A16", *map(slow, ("W8A16", "WCC2", "Wfp8", "WNF4A16-dq", "WNVFP4"))]
WORDS = "derivative through quantizing to W.*straight-through"
REFUSED = pytest.raises(TypeError, match=WORDS)
# Where it is computed, not only traced, codes or scales of 8-bit floats may be refused before that.
OF_FLOAT8 = pytest.raises(TypeError, match=f"{WORDS}|float8_e4m3fn, has no usable derivative")


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_the_derivative_through_quantizing_raises(name, wrapped, rng):
    w = jnp.asarray(rng.standard_normal((256, 8)), jnp.float32)
    both = jnp.stack([w, w])
    decoded = wrapped(lambda w: fdq.dequantize(fdq.quantize(w, name)))
    for asked in (
        lambda: jax.grad(lambda w: decoded(w).sum())(w),
        lambda: jax.jvp(decoded, (w,), (w,)),
        lambda: jax.jacfwd(lambda s: decoded(s * w))(1.0),
        lambda: jax.vmap(lambda w: jax.jvp(decoded, (w,), (w,))[1])(both),
        lambda: jax.grad(lambda w: jax.checkpoint(decoded)(w).sum())(w),
    ):
        with OF_FLOAT8 if name in ("Wfp8", "WNVFP4") else REFUSED:
            asked()


def test_the_derivative_by_statistics_and_of_trees_raises(rng):
    w = jnp.asarray(rng.standard_normal((256, 8)), jnp.float32)
    guided = lambda seen: fdq.dequantize(fdq.quantize(w, "W4A16", importance=seen))  # noqa: E731
    seen = jnp.ones(256)
    with REFUSED:
        jax.jvp(guided, (seen,), (seen,))
    with REFUSED:
        jax.jvp(lambda w: fdq.quantize({"kernel": w}, "W4A16")["kernel"].scale, (w,), (w,))


def test_straight_through(rng):
    w, v = (jnp.asarray(rng.standard_normal((256, 8)), jnp.float32) for _ in range(2))

    def decoded(w):
        return fdq.dequantize(fdq.quantize(w, "W4A16"))

    def stopped_inside(w):
        c = jax.lax.stop_gradient(w)
        return w + decoded(c) - c

    @jax.jit
    def stopped_outside(w):
        return w + jax.lax.stop_gradient(decoded(w) - w)

    for through in (stopped_inside, stopped_outside):
        gradient = jax.grad(lambda w: jnp.square(through(w)).sum())(w)  # noqa: B023
        np.testing.assert_allclose(gradient, 2 * decoded(w), rtol=1e-5, atol=1e-6)
        y, dy = jax.jvp(through, (w,), (v,))
        np.testing.assert_allclose(y, decoded(w), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(dy, v)


def test_what_is_not_differentiated_is_untouched():
    run = without_derivative(lambda x, n: {"twice": 2 * x, "n": n}, "no derivative of this")
    y, dy = jax.jvp(lambda s: s * run(jnp.ones(3), jnp.arange(3))["twice"], (2.0,), (3.0,))
    np.testing.assert_array_equal(y, [4, 4, 4])
    np.testing.assert_array_equal(dy, [6, 6, 6])
    with pytest.raises(TypeError, match="no derivative of this"):
        jax.jvp(lambda x: run(x, jnp.arange(3))["twice"], (jnp.ones(3),), (jnp.ones(3),))
