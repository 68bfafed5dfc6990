"""Second moments: of inputs, of experts by their gates, and of gradients at outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import nn
from fdq.calibration.moments import expert_grams, shrunk
from fdq.calibration.statistics import Calibration
from fdq.quantizers import second_moment

FACTOR = jax.jit(second_moment.feedback_factor)


class Mixture(nnx.Module):
    """Rows straight into experts, picked by a router that is given."""

    def __init__(self, rngs):
        self.first = nn.Linear(6, 6, rngs=rngs)
        self.experts = nn.Experts(3, 6, 5, rngs=rngs)
        self.head = nnx.Linear(6, 7, rngs=rngs)

    def __call__(self, x):
        rows = self.first(x).reshape(-1, 6)
        picks = jnp.stack([jnp.arange(len(rows)) % 2, jnp.ones(len(rows), jnp.int32)], axis=1)
        gates = jnp.stack([rows[:, 0] ** 2, 1.0 - rows[:, 1] ** 2], axis=1)
        return self.head(self.experts(rows, picks, gates).reshape(*x.shape[:2], 6))


def sum_of_logits(logits, batch):
    weights = jnp.cos(jnp.arange(7.0))
    return jnp.sum(jnp.sin(logits) * weights.reshape(1, 1, 7)) + 0.0 * batch.sum()


@pytest.fixture(scope="module")
def seen():
    model = Mixture(nnx.Rngs(params=0))
    x = np.random.default_rng(1).standard_normal((2, 4, 6)).astype(np.float32)
    x[1, 3] = 2.0  # padding
    calibration = fdq.calibrate(
        model, [x], lengths=[[4, 3]], output_moments=True, loss=sum_of_logits
    )
    return model, x, calibration


def test_inputs(seen):
    model, x, calibration = seen
    real = x.reshape(8, 6)[:7]
    found = calibration.input_moment
    np.testing.assert_allclose(found["first.kernel"], real.T @ real / 7, rtol=1e-5, atol=1e-6)
    rows = np.asarray(model.first(x)).reshape(8, 6)[:7]
    gates = np.stack([rows[:, 0] ** 2, 1.0 - rows[:, 1] ** 2])
    picked = [(rows[0::2] * gates[0, 0::2, None]).T @ (rows[0::2] * gates[0, 0::2, None])]
    odd = rows[1::2] * gates[0, 1::2, None]
    both = rows * gates[1, :, None]
    picked.append(odd.T @ odd + both.T @ both)
    picked.append(np.zeros((6, 6), np.float32))
    counts = np.array([4, 10, 0])
    path = "experts.gate_up_proj.kernel"
    np.testing.assert_array_equal(calibration.counts[path], counts)
    mean, borrowed = sum(picked) / 14, 6 / 4
    for expert in range(3):
        wanted = (picked[expert] + borrowed * mean) / (counts[expert] + borrowed)
        np.testing.assert_allclose(found[path][expert], wanted, rtol=1e-4, atol=1e-6)
    assert calibration.rarely_picked[path] == {0: 4, 2: 0}
    assert found["experts.down_proj.kernel"].shape == (3, 5, 5)


def test_gradients_at_outputs(seen):
    model, x, calibration = seen

    def loss(bias):
        moved = nnx.clone(model)
        inner = moved.first

        class Moved(nnx.Module):
            def __call__(self, x):
                return inner(x) + bias

        moved.first = Moved()
        return sum_of_logits(moved(x), x)

    # What padding holds has no loss, but sum_of_logits counts it: its gradients are real here.
    g = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((2, 4, 6)))).reshape(8, 6)
    found = calibration.output_moment["first.kernel"]
    np.testing.assert_allclose(found * 7, g.T @ g, rtol=1e-4, atol=1e-6)
    logits = np.asarray(jax.jit(lambda x: model(x))(x)).reshape(8, 7)
    head = np.cos(logits) * np.cos(np.arange(7.0))
    found = calibration.output_moment["head.kernel"]
    np.testing.assert_allclose(found * 7, head.T @ head, rtol=1e-4, atol=1e-6)


def test_of_experts(rng):
    rows = rng.standard_normal((300, 5)).astype(np.float32)
    index = rng.choice(5, 300, p=[0.5, 0.3, 0.0, 0.1, 0.1]).astype(np.int32)
    found = np.asarray(expert_grams(jnp.asarray(rows), jnp.asarray(index), 4))
    for expert in range(4):
        own = rows[index == expert]
        np.testing.assert_allclose(found[expert], own.T @ own, rtol=1e-5, atol=1e-5)
    means = shrunk(found, np.zeros(4, np.float32))
    assert np.isfinite(means).all()


def test_saved_and_loaded(seen, tmp_path):
    calibration, path = seen[2], tmp_path / "moments.npz"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded.digest == calibration.digest
    assert loaded.rarely_picked == calibration.rarely_picked


def test_refusals():
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="needs logits"):
        fdq.calibrate(model, [jnp.ones((2, 3, 4))], output_moments=True, forward=lambda m, x: None)
    x = np.ones((2, 3, 4), np.float32)
    x[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"layers\.0\.kernel: its absmax has NaN"):
        fdq.calibrate(model, [x], moments=True)


def test_factor(rng):
    x = rng.standard_normal((20, 6)).astype(np.float32)
    x[:, 2] = 0
    moment = np.asarray(jax.jit(second_moment.damped)(jnp.asarray(x.T @ x)))
    factor = np.asarray(FACTOR(jnp.asarray(moment)))
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ moment, np.eye(6), atol=1e-4)
    # Of rank one, with rounding below zero: no factor without more on the diagonal.
    bad = jnp.ones((6, 6)) - 1e-3 * jnp.eye(6)
    assert jnp.isfinite(FACTOR(bad)).all()
    order = np.asarray(second_moment.act_order(jnp.asarray(moment)))
    assert (np.diff(np.diagonal(moment)[order]) <= 0).all()


def test_the_order_of_least_pivots_leaves_less_error(rng):
    """As a factorization that takes the least pivot each time says, in float64; past one block."""
    k = 70
    mixed = rng.standard_normal((4 * k, k)) @ (rng.standard_normal((k, k)) * np.arange(1, k + 1))
    moment = np.asarray(second_moment.damped(jnp.asarray((mixed.T @ mixed).astype(np.float32))))
    order = np.asarray(jax.jit(second_moment.pivot_order)(jnp.asarray(moment)))
    left, expected = moment.astype(np.float64), []
    for _ in range(k):
        alive = [i for i in range(k) if i not in expected]
        pivot = min(alive, key=lambda i: left[i, i])
        left = left - np.outer(left[:, pivot], left[pivot]) / left[pivot, pivot]
        expected.append(pivot)
    np.testing.assert_array_equal(order, expected[::-1])

    def left_over(order: np.ndarray) -> float:
        factor = np.asarray(FACTOR(jnp.asarray(moment[order][:, order])))
        return float(np.sum(1 / np.square(np.diagonal(factor))))

    by_size = np.argsort(-np.diagonal(moment))
    assert left_over(order) < 0.99 * left_over(by_size)
