"""Padding of sample tokens does not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from tests.models import oracles

TOKENS = np.array([[5, 9, 2, 7, 1, 3], [4, 4, 8, 6, 2, 9], [1, 2, 3, 9, 9, 9]])
LENGTHS = np.array([6, 2, 3])


@pytest.mark.slow
def test_what_padding_holds_makes_no_difference():
    """In a mixture of experts: rows of picks, and keys and values, leave it out too."""
    model, _ = oracles.oracle("ernie4_5_moe")
    seen = fdq.calibrate(model, TOKENS, lengths=LENGTHS)
    assert seen.tokens == LENGTHS.sum()
    real = np.arange(6)[None, :] < LENGTHS[:, None]
    again = fdq.calibrate(model, np.where(real, TOKENS, 11), lengths=LENGTHS)
    for statistic in ("absmax", "mean_square"):
        for path, found in getattr(seen, statistic).items():
            assert found.any()
            np.testing.assert_array_equal(found, getattr(again, statistic)[path], err_msg=path)
    for found, wanted in zip(seen.cache, again.cache, strict=True):
        for name in ("k_min", "k_max", "v_min", "v_max"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_padding_may_hold_anything(rng):
    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    x[1, 2:] = np.nan
    seen = fdq.calibrate(model, [x, x], lengths=[[5, 2], [5, 2]])
    real = np.concatenate([x[0], x[1, :2]])
    np.testing.assert_allclose(seen.absmax["layers.0.kernel"], np.abs(real).max(0))
    np.testing.assert_allclose(seen.mean_square["layers.0.kernel"], (real**2).mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([6, 2], r"expected lengths \[3\], one a row, found shape \[2\]"),
        ([6, 2, 7], "whole numbers from 0 to 6, found .*7"),
        ([6, -1, 3], "whole numbers from 0 to 6"),
        ([6.0, 2.0, 3.0], "found float64"),
    ],
)
def test_wrong_lengths(lengths, message):
    model = nnx.Sequential(nnx.Embed(10, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        fdq.calibrate(model, TOKENS, lengths=lengths)


def test_a_layer_whose_rows_are_of_no_position():
    def pooled(module, x):
        return module(x.mean(axis=1)[:1])

    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"is fed \[1, 8\], which has no rows for each position"):
        fdq.calibrate(model, jnp.ones((2, 3, 8)), lengths=[3, 1], forward=pooled)


def test_nothing_is_infinite_on_the_way_and_nothing_foreign_is_calibrated():
    model, _ = oracles.oracle("qwen3")
    with jax.debug_infs(True):
        seen = fdq.calibrate(model, TOKENS, lengths=LENGTHS)
    assert all(np.abs(layer.k_min).max() < 1e6 for layer in seen.cache)
    size = model.config.vocab_size
    with pytest.raises(ValueError, match=rf"tokens range over 1 ... {size}, expected 0 ... "):
        fdq.calibrate(model, np.array([[1, size]]))
    with pytest.raises(TypeError, match="calibrate: expected a Flax NNX module, found a dict"):
        fdq.calibrate({"kernel": np.ones((8, 4))}, TOKENS)
