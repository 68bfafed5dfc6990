"""Trellis codes with feedback: against LDLQ written row by row in float64, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.formats import FORMATS
from fdq.formats.qtensor import dequantize
from fdq.formats.trellis import Trellis
from fdq.quantizers import column_blocks, ldlq, quantize_array, second_moment
from fdq.schemes.scheme import WeightSpec

K, N = 72, 256
T2 = WeightSpec.default("trellis2_v1")


def moment(rng, size: int) -> np.ndarray:
    """Correlated channels of several sizes."""
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    spectrum = np.arange(1, size + 1) ** -0.8
    gains = np.exp(0.4 * rng.standard_normal(size))
    return ((gains[:, None] * basis * spectrum) @ basis.T * gains).astype(np.float32)


@pytest.fixture
def layer(rng):
    w = (0.1 * rng.standard_normal((K, N))).astype(np.float32)
    return w, moment(rng, K), moment(rng, N)


def loss(w, h, g=None, **settings):
    """tr(G Dᵀ H D), D the error of the weight."""
    difference = np.asarray(dequantize(quantize_array(w, T2, **settings)), np.float64) - w
    whole = difference.T @ h @ difference
    return np.trace(whole if g is None else whole @ g)


@pytest.mark.slow
def test_feedback_makes_the_output_better_and_the_weight_worse(layer):
    w, h, g = layer
    inputs = {"input_moment": h}
    both = inputs | {"output_moment": g}
    plain = loss(w, h)
    fed = loss(w, h, method="ldlq", statistics=inputs)
    assert fed < 0.75 * plain
    assert loss(w, np.eye(K), method="ldlq", statistics=inputs) > 1.1 * loss(w, np.eye(K))
    one, two = (loss(w, h, g, method=method, statistics=both) for method in ("ldlq", "ldlq2"))
    assert two < 0.95 * one


@pytest.mark.slow
def test_what_is_left_is_spread_over_the_rows_to_come(layer):
    """The codes are those of targets that an independent recursion computes from decoded rows.

    LDLQ as its paper has it: H = (I + L) diag(d) (I + L)ᵀ, and the target of a row is
    `w + sum over rows before of (their error) * L`, here from the last row of the order to the
    first, for that is where the triangle starts.
    """
    w, h, _ = layer
    q = quantize_array(w, T2, method="ldlq", statistics={"input_moment": h})
    # Undo the fit of the scale, which comes after: targets are in units of the scale before.
    order = np.asarray(second_moment.pivot_order(second_moment.damped(jnp.asarray(h))))
    h = h.astype(np.float64)[order][:, order] / np.mean(np.diag(h)) + 0.01 * np.eye(K)
    w = w.astype(np.float64)[order]
    spread = np.sqrt(np.sum(np.diag(h)[:, None] * w**2, axis=0) / np.trace(h))
    scale = spread.astype(jnp.bfloat16).astype(np.float64)
    stored = np.asarray(q.scale, np.float64)
    levels = np.asarray(dequantize(q), np.float64)[order] / np.where(stored > 0, stored, 1)
    error = w - levels * scale
    target = np.empty_like(w)
    for k in range(K):
        # The best correction of row k for the errors of those before, all after it free.
        before, rest = slice(0, k), slice(k, K)
        shift = np.linalg.solve(h[rest, rest], h[rest, before] @ error[before])[0]
        target[k] = w[k] + shift
    weights = scale**2 / np.mean(scale**2) + 1e-4  # an error counts by what it is in the weight
    best = least_errors(target / scale, weights)
    found = (weights * np.square(levels - target / scale)).sum(axis=1)
    # A few streams start from another overlap, where rounding made one of two as good.
    assert np.mean(np.isclose(found, best, rtol=1e-3)) > 0.9
    assert found.sum() == pytest.approx(best.sum(), rel=2e-3)


def least_errors(u: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted squared errors of the best streams of scaled rows."""
    format = FORMATS[T2.format]
    assert isinstance(format, Trellis)
    one, say = jnp.ones((1, u.shape[1]), jnp.float32), jnp.asarray(weights, jnp.float32)[None]
    levels = format.levels(format.nearest(jnp.asarray(u, jnp.float32), one, say))
    return (weights * np.square(np.asarray(levels) - u)).sum(axis=1)


@pytest.mark.slow
@pytest.mark.longest
def test_stacks_are_their_matrices(layer, rng):
    """Experts go through the search together; a short last tile and rows that fill no block too."""
    w = rng.standard_normal((2, 40, 144)).astype(np.float32)
    h, g = (np.stack([moment(rng, size) for _ in range(2)]) for size in (40, 144))
    both = {"input_moment": h, "output_moment": g}
    whole = quantize_array(w, T2, method="ldlq2", statistics=both)
    for i in range(2):
        each = {name: a[i] for name, a in both.items()}
        one = quantize_array(w[i], T2, method="ldlq2", statistics=each)
        same = np.mean(np.asarray(whole.codes[i]) == np.asarray(one.codes))
        assert same > 0.2  # sums in another order choose other streams that are as good
        errors = []
        for q in (jax.tree.map(lambda a: a[i], whole), one):  # noqa: B023
            difference = np.asarray(dequantize(q)) - w[i]
            errors.append(np.trace(difference.T @ h[i] @ difference @ g[i]))
        assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_errors_in_a_row_are_made_up_for_in_later_parts(rng):
    """Against the best errors of all columns to come, by least squares in float64."""
    n, part = 24, 8
    cost = moment(rng, n)
    cost /= np.mean(np.diag(cost))
    weights, feedback = (
        np.asarray(a) for a in jax.jit(ldlq._in_parts, static_argnums=1)(cost, part)
    )
    cost = cost.astype(np.float64) + ldlq.SMALL * np.eye(n)
    for start in range(0, n, part):
        before, own = slice(0, start), slice(start, start + part)
        # With all from here on free, and what an error here costs that those after make up for.
        best = np.linalg.solve(cost[start:, start:], cost[start:, before])[:part].T
        left = np.linalg.inv(np.linalg.inv(cost[start:, start:])[:part, :part])
        np.testing.assert_allclose(feedback[before, own], best, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(weights[own], np.diag(left), rtol=1e-3)
        assert not feedback[start:, own].any()


def test_blocks_of_large_gradients_come_first_and_stay_in_place(rng):
    """Only the block that comes last hears of the other; a shorter one is the last of all."""
    w = rng.standard_normal((32, 10)).astype(np.float32)
    g = np.diag(np.repeat([1.0, 4.0, 9.0], [4, 4, 2])).astype(np.float32)
    g[0, 4] = g[4, 0] = 1.8

    def encode(part, root):
        del root
        return (jnp.round(part),), jnp.round(part)

    run = jax.jit(lambda w, g: column_blocks.by_blocks(w, g, 4, encode)[0])
    found = np.asarray(run(w, g))
    expected = np.round(w)
    left = (w - expected)[:, 4]
    mean = np.mean(np.diag(g))
    expected[:, 0] = np.round(w[:, 0] + left * g[0, 4] / (g[0, 0] + column_blocks.DAMPING * mean))
    np.testing.assert_array_equal(found, expected)
    assert (expected != np.round(w)).any()


def test_scales_are_the_best_of_their_levels(layer, rng):
    """Of `tr(G Dᵀ H D)` in float64: no worse than the best of each column, nor than any near."""
    w, h, g = layer
    columns = 32
    w, g = w[:, :columns], g[:columns, :columns]
    levels = w / 0.1 + 0.3 * rng.standard_normal(w.shape).astype(np.float32)
    format = FORMATS[T2.format]
    assert isinstance(format, Trellis)
    rows = ldlq._Rows(format, jnp.asarray(h), jnp.eye(K))
    start = jnp.full((1, columns), 0.1)
    apart, together = (
        np.asarray(jax.jit(rows._fitted)(w, levels, start, cost), np.float64) for cost in (None, g)
    )

    def loss(scale):
        difference = levels * scale - w.astype(np.float64)
        return np.trace(difference.T @ h @ difference @ g)

    assert loss(together) < 0.999 * loss(apart)
    for column in range(0, columns, 5):
        for factor in (0.98, 1.02):
            other = together.copy()
            other[0, column] *= factor
            assert loss(together) < loss(other)


def test_moments_that_are_missing_or_of_another_format(layer):
    w, h, _ = layer
    with pytest.raises(ValueError, match=r"a\.b: .*'ldlq' needs the input_moment.*moments=True"):
        quantize_array(w, T2, method="ldlq", path="a.b")
    with pytest.raises(ValueError, match=r"'ldlq2' needs the output_moment"):
        quantize_array(w, T2, method="ldlq2", statistics={"input_moment": h})
    with pytest.raises(ValueError, match="no method 'ldlq', which is for trellis codes"):
        quantize_array(w, WeightSpec.default("int8"), method="ldlq", statistics={"input_moment": h})
    q = quantize_array(w, T2, method="ldlq", statistics={"input_moment": 0 * h})
    assert np.isfinite(np.asarray(fdq.dequantize(q))).all()
