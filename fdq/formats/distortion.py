"""Expected squared error of a format on independent N(0, 1) weights, without quantizing any tensor.

Closed-form scales (absmax, signed max, min and max) are integrated: given the extremes of a group,
its other weights are truncated normals, so the error is a one-dimensional integral, averaged over
quantiles of the extremes (`integral`). Searched scales have no such form; their figure is the
error of a small seeded sample (`simulated`, `searched`), good to about 1%.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq.formats import grouping
from fdq.schemes.scheme import WeightSpec

ABSMAX_NODES = 256
RANGE_NODES = 24
POINTS = 8192
SAMPLE_WEIGHTS = 1 << 19
# Rows and columns that the largest weight of a whole matrix is taken over (nvfp4's global scale).
MATRIX_WEIGHTS = 4096 * 4096

Fit = Callable[[Any, WeightSpec], dict[str, Any]]

_NORMAL = statistics.NormalDist()


def integral(format: Any, spec: WeightSpec, fit: Fit, k: int) -> float:
    """E|w - w'|^2 per weight under the scales of `fit`, a closed form of a `ScaledFormat`.

    `k` rows of the weight are the size of a group per channel; per tensor it is `k * k`.
    """
    size = max(2, grouping.group_rows(spec, k, k))
    extremes = 1 if spec.symmetric else 2
    if extremes == 2:
        low, high = _range_nodes(size)
    else:
        levels = (np.arange(ABSMAX_NODES) + 0.5) / ABSMAX_NODES
        high = np.array([_absmax_quantile(size, p) for p in levels])
        low = -high
    rows = spec.group_size if spec.granularity == "group" and spec.group_size else 2
    # Only the extremes matter to a closed form. Where columns are other groups there is a second
    # one with the largest weight of the matrix, which a scale of the whole matrix follows.
    columns = 2 if spec.granularity in ("group", "channel") else 1
    example = np.zeros((len(high), rows, columns), np.float32)
    example[:, 0, 1:] = _absmax_quantile(MATRIX_WEIGHTS, 0.5)
    example[:, 0, 0] = high
    if extremes == 2:
        example[:, 1, 0] = low

    def error(example: jax.Array, x: jax.Array) -> jax.Array:
        parameters = fit(example, spec)
        scale = format.multiplier(parameters, spec)[0, 0]
        zero = parameters["zero"][0, 0].astype(jnp.float32) if "zero" in parameters else None
        offset = parameters["offset"][0, 0].astype(jnp.float32) if "offset" in parameters else 0.0
        return x - offset - format.project((x - offset) / scale, spec, zero) * scale

    points = (np.arange(POINTS) + 0.5) / POINTS
    x = low[:, None] + (high - low)[:, None] * points
    density = np.exp(-0.5 * x * x)
    density /= density.sum(axis=1, keepdims=True)
    ends = np.stack([low, high], axis=1) if extremes == 2 else high[:, None]
    run = jax.jit(jax.vmap(error))
    inner = np.asarray(run(example, x.astype(np.float32)), np.float64)
    outer = np.asarray(run(example, ends.astype(np.float32)), np.float64)
    rest = (inner**2 * density).sum(axis=1)
    total = (size - extremes) * rest + (outer**2).sum(axis=1)
    return float(total.mean() / size)


def simulated(format: Any, spec: WeightSpec, fit: Fit, k: int) -> float:
    """E|w - w'|^2 per weight under the scales of `fit`, on a seeded sample."""
    w = _sample(spec, k)

    def decoded(w: jax.Array) -> jax.Array:
        return format.decode(format.encode(w, spec, fit(w, spec)), spec)

    return float(jnp.mean(jnp.square(w - jax.jit(decoded)(w)[: w.shape[0]])))


def searched(format: Any, spec: WeightSpec, k: int) -> float:
    """E|w - w'|^2 per weight under the best candidate of every group, on a seeded sample."""
    w = _sample(spec, k)
    groups = grouping.to_groups(w, spec)
    candidates = format.candidates(w, spec)

    @jax.jit
    def error(i: jax.Array, sign: jax.Array) -> jax.Array:
        parameters = candidates.at(i)
        scale = format.multiplier(parameters, spec)[..., None, :] * sign
        zero = parameters.get("zero")
        zero = None if zero is None else zero.astype(jnp.float32)[..., None, :]
        above = groups
        if "offset" in parameters:
            above = groups - parameters["offset"].astype(jnp.float32)[..., None, :]
        level = format.project(above / scale, spec, zero)
        return jnp.sum(jnp.square(above - level * scale), axis=-2)

    signs = (1.0, -1.0) if format.lopsided(spec) else (1.0,)
    least = jnp.full(groups.shape[:-2] + groups.shape[-1:], jnp.inf)
    for i in range(candidates.count):
        for sign in signs:
            least = jnp.minimum(least, error(jnp.int32(i), jnp.float32(sign)))
    return float(jnp.sum(least) / w.size)


def _sample(spec: WeightSpec, k: int) -> jax.Array:
    rows = k if spec.granularity != "group" else spec.group_size or k
    columns = max(1, SAMPLE_WEIGHTS // rows)
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)


def of_codebook(codebook: np.ndarray, group: int, unit: float) -> float:
    """The error of the nearest of `codebook` `[C, d]`, simulated.

    The `group` weights that share a scale take the best of 13 around `unit` standard deviations.
    """
    count, d = codebook.shape
    x = np.random.default_rng(count).standard_normal((1024, group // d, d)).astype(np.float32)
    best = np.full(len(x), np.inf)
    book = codebook.astype(np.float32)
    for scale in unit * np.linspace(0.7, 1.3, 13).astype(np.float32):
        score = x @ (scale * book).T - 0.5 * np.sum(np.square(scale * book), axis=1)
        error = np.sum(np.square(x), axis=(1, 2)) - 2 * score.max(axis=-1).sum(axis=1)
        best = np.minimum(best, error)
    return float(best.sum() / x.size)


def _absmax_quantile(size: int, p: float) -> float:
    """The `p` quantile of the largest magnitude of `size` normal numbers."""
    return -_NORMAL.inv_cdf(-0.5 * math.expm1(math.log(p) / size))


def _range_nodes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest of `size` normal numbers, on a grid of their joint quantiles."""
    p = (np.arange(RANGE_NODES) + 0.5) / RANGE_NODES
    low, high = [], []
    for q in p:
        above = -math.expm1(math.log(q) / size)
        largest = -_NORMAL.inv_cdf(above)
        for r in p:
            # The other size - 1 numbers lie below `largest`; all lie above the smallest.
            below = -math.expm1(math.log(1 - r) / (size - 1)) * (1 - above)
            low.append(_NORMAL.inv_cdf(below))
            high.append(largest)
    return np.array(low), np.array(high)
