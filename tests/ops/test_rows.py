"""Rows that their readers finish: the same numbers as the layers that would have finished them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdq import nn
from fdq.nn.handing_on import hand_on, reads_rows, takes_rows
from fdq.nn.norm import normed
from fdq.ops.rows import Gated, Normed, Sums, as_array, flattened


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normed_is_the_norm_of_a_module(dtype, rng):
    x = jnp.asarray(rng.standard_normal((2, 3, 16)), dtype)
    norm = nn.RMSNorm(16, epsilon=1e-5, dtype=dtype)
    norm.scale[...] = jnp.asarray(rng.standard_normal(16), dtype)
    rows = normed(norm, x)
    assert isinstance(rows, Normed) and rows.shape == x.shape and rows.dtype == dtype
    y = np.asarray(x, np.float64)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(np.asarray(rows.value(), np.float64), y, rtol=1e-2, atol=1e-6)
    np.testing.assert_array_equal(rows.value(), norm(x))
    np.testing.assert_array_equal(flattened(rows).value(), rows.value().reshape(6, 16))


def test_sums_round_first_and_add_the_bias_then(rng):
    parts = jnp.asarray(rng.standard_normal((3, 2, 5, 8)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(8), jnp.float32)
    sums = Sums(parts, bias, jnp.dtype(jnp.bfloat16))
    assert sums.shape == (2, 5, 8) and flattened(sums).shape == (10, 8)
    wanted = (parts[0] + parts[1] + parts[2]).astype(jnp.bfloat16)
    wanted = wanted + bias.astype(jnp.bfloat16)[None, None]
    np.testing.assert_array_equal(sums.value(), wanted)
    gate, up = jnp.split(wanted, 2, axis=-1)
    gated = Gated(sums)
    assert gated.shape == (2, 5, 4) and gated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gated.value(), jax.nn.silu(gate) * up)
    np.testing.assert_array_equal(flattened(gated).value(), gated.value().reshape(10, 4))
    array = wanted[0]
    np.testing.assert_array_equal(Sums.of(array).value(), array)
    assert Sums.of(array).dtype == jnp.bfloat16 and as_array(array) is array


def test_rows_are_pytrees(rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 8)), jnp.float32)
    rows = Normed(x, jnp.ones(8), 1e-6)
    mapped = jax.jit(jax.vmap(lambda x: Normed(x, rows.scale, 1e-6)))(x)
    np.testing.assert_allclose(mapped.x, x)
    y = jax.vmap(lambda r: r.value(), in_axes=(Normed(0, None, 1e-6),))(rows)
    np.testing.assert_allclose(y, rows.value(), rtol=1e-6)
    gradient = jax.grad(lambda r: r.value().sum())(rows)
    assert gradient.x.shape == x.shape and gradient.scale.shape == (8,)


def test_other_peoples_modules_are_called_with_arrays():
    class Ours(nnx.Module):
        @takes_rows
        def __call__(self, x):
            return x

    class Overridden(Ours):
        def __call__(self, x):
            return x

    class OtherNorm(nn.RMSNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)

    x = jnp.ones((2, 8))
    rows = Normed(x, jnp.ones(8), 0.0)
    assert reads_rows(Ours()) and not reads_rows(Overridden())
    assert hand_on(Ours(), rows) is rows
    np.testing.assert_allclose(hand_on(Overridden(), rows), x)
    np.testing.assert_allclose(normed(OtherNorm(8, epsilon=0.0), x), 2 * x)
