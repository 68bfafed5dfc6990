"""GPTQ: code for code what a plain float64 loop in NumPy makes, and better than rounding alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.quantizers import polish, quantize_array, two_sided
from fdq.quantizers.gptq import rounded
from fdq.quantizers.grid import Grid
from fdq.quantizers.second_moment import feedback_factor
from fdq.schemes.scheme import Scheme
from tests.covering import longest, slow, slow_but

NAMES = ("W4A16-g32", "W4A16-g32-asym", "W3A16-channel-affine", "W2A16-g32", "W2A16-g32-asym",
         "WNF4A16-g32", "WNVFP4A16", "WMXFP4A16", "Wfp8A16-channel", "W8A16")  # fmt: skip


def spec_of(name):
    spec = Scheme.parse(name).weight
    assert spec is not None
    return spec


def moment(rng, k):
    mixing = np.eye(k) + rng.standard_normal((k, k)) / np.sqrt(k)
    x = rng.standard_normal((4 * k, k)) @ mixing * np.exp(0.5 * rng.standard_normal(k))
    return (x.T @ x / len(x)).astype(np.float32)


def damped(h, part=0.01):
    """Of float64 numbers, by definition."""
    h = (h + h.T) / 2 / np.mean(np.diagonal(h))
    return h + part * np.eye(len(h))


def upper(h):
    """U of inv(h) = Uᵀ U, from the inverse itself."""
    return np.linalg.cholesky(np.linalg.inv(h)).T


def candidates(grid, spec):
    """All values that each weight can take, `[levels, K, N]`, from the format's decoding."""
    shape = grid.scale.shape
    ends = np.linspace(-16, 16, 65)  # of any format of 4 bits or fewer
    found = {}
    for u in ends:
        level = np.asarray(grid.level(grid.value(jnp.full(shape, u, jnp.float32)), spec))
        found[u] = np.asarray(grid.value(jnp.asarray(level)), np.float64)
    if spec.format == "nf4":
        for u in np.linspace(-1, 1, 201):
            level = np.asarray(grid.level(grid.value(jnp.full(shape, u, jnp.float32)), spec))
            found[u] = np.asarray(grid.value(jnp.asarray(level)), np.float64)
    return np.stack(list(found.values()))


def plain_gptq(w, values, h):
    """Row by row, each error made up for by the rows after it; nothing blocked."""
    w, u, out = w.astype(np.float64).copy(), upper(h), np.zeros(w.shape)
    for j in range(len(w)):
        nearest = np.abs(values[:, j] - w[j]).argmin(axis=0)
        out[j] = np.take_along_axis(values[:, j], nearest[None], axis=0)[0]
        w[j + 1 :] -= np.outer(u[j, j + 1 :], (w[j] - out[j]) / u[j, j])
    return out


def plain_two_sided(w, values, h, g):
    """Weight by weight, with `D = Uᵀ E V`."""
    u, v, (k, n) = upper(h), upper(g), w.shape
    e, out = np.zeros((k, n)), np.zeros((k, n))
    for j in range(k):
        for m in range(n):
            target = w[j, m] - u[: j + 1, j] @ e[: j + 1, : m + 1] @ v[: m + 1, m]
            out[j, m] = values[np.abs(values[:, j, m] - target).argmin(), j, m]
            e[j, m] = (target - out[j, m]) / (u[j, j] * v[m, m])
    return out


def plain_descent(w, q, values, h):
    """Each row set to the best level beside all others."""
    q = q.copy()
    for j in range(len(w)):
        target = q[j] + h[j] @ (w - q) / h[j, j]
        nearest = np.abs(values[:, j] - target).argmin(axis=0)
        q[j] = np.take_along_axis(values[:, j], nearest[None], axis=0)[0]
    return q


@pytest.mark.parametrize("name", slow_but(("W3A16-channel-affine", "WNF4A16-g32"), NAMES[:8]))
def test_code_for_code(name, rng):
    """Odd sizes: rows that fill no block, columns that fill no tile."""
    spec, k, n = spec_of(name), 160, 21
    w = rng.standard_normal((k, n)).astype(np.float32)
    h, g = damped(moment(rng, k)), damped(moment(rng, n), 0.1)
    parameters = quantize_array(w, spec, method="search").arrays()
    del parameters["codes"]

    @jax.jit
    def run(w, h, g, parameters):
        grid = Grid.of(parameters, spec, w.shape)
        u, v = feedback_factor(h), feedback_factor(g)
        one = rounded(w, grid, u, spec)
        better = polish.descended(w, one, grid, h, spec)
        both = two_sided.rounded(w, grid, u, v, spec)
        again = two_sided.descended(w, both, grid, h, v, spec)
        return grid, *(grid.value(levels) for levels in (one, better, both, again))

    found = run(w, h.astype(np.float32), g.astype(np.float32), parameters)
    grid, one, better, both, again = found[0], *(np.asarray(a, np.float64) for a in found[1:])
    values = candidates(grid, spec)
    w = w.astype(np.float64)
    np.testing.assert_array_equal(one, plain_gptq(w, values, h))
    np.testing.assert_array_equal(better, plain_descent(w, one, values, h))
    np.testing.assert_array_equal(both, plain_two_sided(w, values, h, g))

    def loss(q):
        return np.trace(g @ (w - q).T @ h @ (w - q))

    assert loss(both) < loss(one) and loss(again) < loss(both)
    assert np.trace((w - better).T @ h @ (w - better)) < np.trace((w - one).T @ h @ (w - one))


@pytest.mark.parametrize("method", [slow("gptq"), slow("gptq2")])
@pytest.mark.parametrize(
    "name", ["W2A16-g32", *(longest(name) for name in NAMES if name != "W2A16-g32")]
)
def test_less_error_than_rounding(name, method, rng):
    """Of a stack, in the measure that is minimized; each matrix by its own moments."""
    spec, shape = spec_of(name), (2, 96, 40)
    w = rng.standard_normal(shape).astype(np.float32)
    h = np.stack([moment(rng, 96) for _ in range(2)])
    g = np.stack([moment(rng, 40) for _ in range(2)])
    statistics = {"input_moment": h, "output_moment": g}
    q = quantize_array(w, spec, method=method, statistics=statistics)
    plain = quantize_array(w, spec, statistics=statistics)
    one = quantize_array(
        w[1], spec, method=method, statistics={k: v[1] for k, v in statistics.items()}
    )
    np.testing.assert_array_equal(np.asarray(q.codes)[1], np.asarray(one.codes))

    def loss(q):
        d = np.asarray(fdq.dequantize(q), np.float64) - w
        g_used = g if method == "gptq2" else np.broadcast_to(np.eye(40), g.shape)
        return np.einsum("eij,eik,ekl,elj->", d, h, d, g_used, optimize=True)

    assert loss(q) < 0.85 * loss(plain)


@pytest.mark.slow
def test_whole_model_and_what_is_refused(rng):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(32, 32, rngs=rngs)
            self.head = nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.up(x)))

    model = Two(nnx.Rngs(0))
    x = rng.standard_normal((8, 16, 32)).astype(np.float32)
    seen = fdq.calibrate(model, [x], output_moments=True)
    quantized = fdq.quantize(model, "W4A16-g32", method="gptq", calibration=seen)
    plain = fdq.quantize(model, "W4A16-g32")
    errors = [np.square(np.asarray(m(x)) - np.asarray(model(x))).mean() for m in (quantized, plain)]
    assert errors[0] < 0.8 * errors[1]
    with pytest.raises(ValueError, match=r"needs the input_moment .*moments=True"):
        fdq.quantize(model, "W4A16-g32", method="gptq", calibration=fdq.calibrate(model, [x]))
    with pytest.raises(ValueError, match="needs the output_moment .*output_moments=True"):
        one = fdq.calibrate(model, [x], moments=True)
        fdq.quantize(model, "W4A16-g32", method="gptq2", calibration=one)
    spec, w = spec_of("W4A16-g32"), np.ones((32, 4), np.float32)
    bad = np.eye(32, dtype=np.float32)
    for value, message in ((np.nan, "finite"), (-1.0, "on its diagonal")):
        bad[3, 3] = value
        with pytest.raises(ValueError, match=rf"input_moment of .*{message}.* at \[3, 3\]"):
            quantize_array(w, spec, method="gptq", statistics={"input_moment": bad})
    with pytest.raises(ValueError, match=r"input_moment of shape \(32, 32\), found \(16, 16\)"):
        quantize_array(w, spec, method="gptq", statistics={"input_moment": np.eye(16)})
    with pytest.raises(ValueError, match="no method 'gptq', which is for formats with one code"):
        wide = np.zeros((64, 16), np.float32)
        quantize_array(wide, spec_of("WINT2"), method="gptq", statistics={"input_moment": bad})


def test_moments_of_zeros(rng):
    """Dead inputs, and a layer that saw nothing but zeros: as if all counted alike."""
    spec = spec_of("W4A16-g32")
    w = rng.standard_normal((32, 8)).astype(np.float32)
    q = quantize_array(w, spec, method="gptq", statistics={"input_moment": np.zeros((32, 32))})
    plain = quantize_array(w, spec, method="search")
    for a, b in zip((q, plain), (w, w), strict=True):
        assert np.square(np.asarray(fdq.dequantize(a)) - b).mean() < 0.02
