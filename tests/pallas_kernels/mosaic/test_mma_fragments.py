"""The tensor cores' registers, byte by byte, against the products that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import slow
from jax import lax
from warp_emulator import emulated_gpu

from pallas_kernels.mosaic import mma_fragments as mma
from pallas_kernels.mosaic.mma_codes import CODES

KINDS = list(CODES)


def words_of(rng, kind, head_dim):
    """int32 [64, W] and the values [64, D] that they hold, before a zero point."""
    d = head_dim
    if kind == "int4":
        values = rng.integers(0, 16, (64, d))
        packed = (values[:, 0::2] | values[:, 1::2] << 4).astype(np.uint8)
    elif kind == "int8":
        packed = values = rng.integers(-128, 128, (64, d)).astype(np.int8)
    elif kind == "float8_e4m3":
        packed = rng.integers(0, 256, (64, d)).astype(np.uint8)
        packed[packed & 0x7F == 0x7F] = 0
        values = packed.view(jnp.float8_e4m3fn)
    else:
        packed = values = rng.standard_normal((64, d)).astype(jnp.dtype(kind))
    return jnp.asarray(packed.view(np.int32)), values.astype(np.float32)


def points_of(rng, kind):
    return rng.integers(0, 16, 64).astype(np.float32) if kind == "int4" else None


def zero(values, points):
    return values if points is None else values - points[:, None]


@pytest.mark.parametrize("heads, head_dim", [(8, 128), slow(16, 64), slow(8, 256)])
@pytest.mark.parametrize("kind", KINDS)
def test_scores(rng, monkeypatch, kind, heads, head_dim):
    codes = CODES[kind](head_dim)
    words, values = words_of(rng, kind, head_dim)
    points = points_of(rng, kind)
    query = jnp.asarray(rng.standard_normal((heads, head_dim)), jnp.float32)
    terms = mma.split_terms(query, codes.dtype, 2)
    offset = None if points is None else jnp.asarray(points)
    with emulated_gpu(monkeypatch):
        scores = mma.tile_scores(words, terms, codes, offset)
    exact = sum(np.asarray(t).astype(np.float64) for t in terms)
    expected = zero(values, points).astype(np.float64) @ exact.T * codes.shift
    assert np.abs(scores - expected).max() < 1e-6 * np.abs(expected).max()
    # The interpreter's version is the same product.
    emulated = mma.tile_scores(words, terms, codes, offset)
    assert np.abs(emulated - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("heads, head_dim", [(8, 128), slow(16, 64), slow(8, 256)])
@pytest.mark.parametrize("kind", KINDS)
def test_sums(rng, monkeypatch, kind, heads, head_dim):
    codes = CODES[kind](head_dim)
    tiles = [words_of(rng, kind, head_dim) for _ in range(2)]
    points = [points_of(rng, kind) for _ in tiles]
    weights = [jnp.asarray(rng.uniform(0, 1, (64, heads)), jnp.float32) for _ in tiles]
    terms = [mma.split_terms(w, codes.dtype, 2) for w in weights]
    sums = jnp.asarray(rng.standard_normal((4, head_dim, heads)), jnp.float32)
    shrink = np.repeat(rng.uniform(0.5, 1, (4, 1, heads)), 16, axis=1).reshape(64, heads)
    shrink = jnp.asarray(shrink, jnp.float32)
    offsets = None if points[0] is None else [jnp.asarray(p) for p in points]
    words = [w for w, _ in tiles]
    with emulated_gpu(monkeypatch):
        out = mma.add_values(sums, shrink, words, terms, codes, offsets)
        scaled = mma.scale_sums(sums, shrink, codes)
    by_warp = np.asarray(shrink).reshape(4, 16, heads)[:, :1]
    np.testing.assert_array_equal(scaled, sums * by_warp)
    expected = np.asarray(sums * by_warp, np.float64)
    for (_, values), point, term in zip(tiles, points, terms, strict=True):
        weight = sum(np.asarray(t).astype(np.float64) for t in term).reshape(4, 16, heads)
        value = zero(values, point).astype(np.float64).reshape(4, 16, head_dim)
        expected = expected + np.einsum("wsd,wsh->wdh", value, weight) * codes.shift
    assert np.abs(out - expected).max() < 1e-6 * np.abs(expected).max()
    emulated = mma.add_values(sums, shrink, words, terms, codes, offsets)
    assert np.abs(emulated - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("heads", [8, 16])
def test_the_maximum_of_a_warp(rng, monkeypatch, heads):
    x = jnp.asarray(rng.standard_normal((64, heads)), jnp.float32)
    with emulated_gpu(monkeypatch):
        top = mma.warp_maximum(x)
    expected = np.repeat(np.asarray(x).reshape(4, 16, heads).max(1, keepdims=True), 16, axis=1)
    np.testing.assert_array_equal(top, expected.reshape(64, heads))
    np.testing.assert_array_equal(mma.warp_maximum(x), top)


def test_the_emulator_notices_a_wrong_byte(rng, monkeypatch):
    """A negative control: another order of bytes is another result."""
    codes = CODES["int8"](128)
    words, _ = words_of(rng, "int8", 128)
    query = jnp.asarray(rng.standard_normal((8, 128)), jnp.float16)
    swapped = words << 16 | lax.shift_right_logical(words, jax.numpy.full_like(words, 16))
    with emulated_gpu(monkeypatch):
        scores = mma.tile_scores(words, [query], codes)
        others = mma.tile_scores(swapped, [query], codes)
    assert np.abs(scores - others).max() > 0.1 * np.abs(scores).max()


def test_two_terms_are_a_float32(rng):
    x = jnp.asarray(rng.uniform(0, 16384, 1000), jnp.float32)
    for dtype, bound in ((jnp.float16, 2.0**-21), (jnp.bfloat16, 2.0**-16)):
        terms = mma.split_terms(x, dtype, 2)
        total = sum(np.asarray(t).astype(np.float64) for t in terms)
        assert np.abs(total / np.asarray(x) - 1).max() < bound
