"""Tiles of a weight on tensor cores: what is emitted, register by register, against float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from canonical_weights import Case, random_weight
from closeness import error
from covering import slow
from warp_emulator import emulated_gpu

from pallas_kernels.matmul import mma_products as mma
from pallas_kernels.weights.decoded_weight import decoded_weight

BOUND = 1e-6
ONES = {"float8_e8m0fnu": 0x7F7F7F7F, "uint4": 0x11111111}  # scales that are codes
INT4, INT8 = Case("int4", "channel", scale_dtype=np.float32), Case("int8", "group", 128)


def tile(case, dtype, m, rng):
    """A tile of a random weight, rows of x, and their product before scales."""
    w, _ = random_weight(case, 128, 128)
    layout, words = w.layout, w.layout.words
    count = words.words
    own = w.words[: mma.UNITS * count].reshape(mma.UNITS, count, 128)
    ones = w.scale
    if ones is not None and not words.scaled_fragments:
        ones = jnp.full_like(ones, ONES.get(w.layout.scale_dtype, 1))
    whole = w.column_scale if w.column_scale is None else jnp.ones_like(w.column_scale)
    plain = type(w)(w.words, ones, w.zero, whole, w.constants, {}, layout)
    k = mma.UNITS * words.rows
    x = jnp.asarray(rng.standard_normal((m, k)) + 0.25, dtype)
    values = np.asarray(decoded_weight(plain), np.float64)[:k]
    settings = {"columns": [c[0] for c in w.constants], "middle": layout.bias}
    if w.zero is not None:
        settings["zero"] = (w.zero[0] & 255).astype(jnp.float32)
    values = values[:k]
    if words.scaled_fragments:
        settings["scales"] = w.scale[0], 0
    expected = values.T @ np.asarray(x, np.float64).T * 2.0 ** words.fragment_exponent(dtype)
    return [own[:, i] for i in range(count)], mma.paired(x, words), words, settings, expected


SLOW = (pytest.mark.slow,)
FORMATS = [
    (INT4, jnp.bfloat16, 16),
    slow(INT4, jnp.float16, 8),
    slow(INT8, jnp.bfloat16, 8),
    slow(INT8, jnp.float16, 16),
    slow(Case("int4", "group", 64, zero_point="integer"), jnp.bfloat16, 8),
    slow(Case("int8", "group", 64, zero_point="integer"), jnp.float16, 8),
    *(
        pytest.param(case, dtype, 8, marks=marks)
        for dtype, marks in ((jnp.bfloat16, SLOW), (jnp.float16, (*SLOW, pytest.mark.longest)))
        for case in (
            Case("int3", "channel", scale_dtype=np.float32),
            Case("int2", "group", 64, zero_point="half"),
            Case("nf4", "group", 64),
            Case("float8_e4m3", "channel", scale_dtype=np.float32),
            Case("float8_e5m2", "channel", scale_dtype=np.float32),
            Case("mxfp4", "group", 32, scale_dtype=ml_dtypes.float8_e8m0fnu),
            Case("nvfp4", "group", 16, scale_dtype=ml_dtypes.float8_e4m3fn),
            Case("mxfp8", "group", 32, scale_dtype=ml_dtypes.float8_e8m0fnu),
            Case("cc2", "group", 64),
        )
    ),
]


@pytest.mark.parametrize(("case", "dtype", "m"), FORMATS, ids=str)
def test_a_tile(rng, monkeypatch, case, dtype, m):
    words, x, format, settings, expected = tile(case, dtype, m, rng)
    start = jnp.asarray(rng.standard_normal((128, m)), jnp.float32)
    start = start * jnp.float32(2.0 ** format.fragment_exponent(dtype))
    with emulated_gpu(monkeypatch):
        emitted = mma.multiply(start, words, x, format, dtype, **settings)
    interpreted = mma.multiply(start, words, x, format, dtype, **settings)
    for found in (emitted, interpreted):
        assert error(found - start, expected) < BOUND * (3 if case.format == "nf4" else 1)


def test_scales_and_the_turned_result(rng, monkeypatch):
    sums, totals = (jnp.asarray(rng.standard_normal((128, 16)), jnp.float32) for _ in range(2))
    scale = jnp.asarray(rng.standard_normal(128), jnp.float32)
    with emulated_gpu(monkeypatch):
        scaled = mma.add_scaled(totals, sums, scale)
        turned = mma.turned(totals)
    np.testing.assert_allclose(scaled, mma.add_scaled(totals, sums, scale), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(turned, np.asarray(totals).T)
    np.testing.assert_array_equal(mma.turned(totals), np.asarray(totals).T)


def test_the_emulator_notices_a_wrong_nibble(rng, monkeypatch):
    """A negative control."""
    words, x, format, settings, expected = tile(INT4, jnp.bfloat16, 8, rng)
    words[0] = words[0].at[2, 77].set(words[0][2, 77] ^ 0x100000)
    with emulated_gpu(monkeypatch):
        found = mma.multiply(jnp.zeros((128, 8)), words, x, format, jnp.bfloat16, **settings)
    wrong = np.abs(np.asarray(found) - expected).max(axis=1) > 1e-3 * np.abs(expected).max()
    assert np.flatnonzero(wrong).tolist() == [77]
