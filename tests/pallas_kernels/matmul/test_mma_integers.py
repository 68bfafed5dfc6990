"""int8 rows on tensor cores: what is emitted, byte by byte, and the kernel, against exact sums."""

import jax.numpy as jnp
import numpy as np
import pytest
from canonical_weights import Case, generator, random_weight
from closeness import error
from covering import longest, slow
from warp_emulator import emulated_gpu

from pallas_kernels.matmul import mma_integers as integers
from pallas_kernels.matmul.gathered_mma import gathered_mma
from pallas_kernels.matmul.mma import mma_matmul
from pallas_kernels.weights.decoded_weight import decoded_weight

BOUND = 5e-6
CHANNEL = {"granularity": "channel", "scale_dtype": np.float32}


def codes(m, k):
    return jnp.asarray(generator("codes", m, k).integers(-128, 128, (m, k)), jnp.int8)


def exact(x, values):
    return np.asarray(x, np.float64) @ values


@pytest.mark.parametrize(("format", "m"), [("int4", 16), slow("int8", 8), slow("int2", 24)])
def test_a_tile(rng, monkeypatch, format, m):
    w, _ = random_weight(Case(format, **CHANNEL), 128, 128)
    words, ones = w.layout.words, jnp.ones_like(w.column_scale)
    plain = type(w)(w.words, w.scale, w.zero, ones, w.constants, {}, w.layout)
    k = 4 * words.rows
    values = np.asarray(decoded_weight(plain), np.int64)[:k] * 2 ** (8 - words.bits)
    rows = codes(m, k)
    x, planes = integers.byte_words(rows, words), words.signed_planes(w.words[:4])
    start = jnp.asarray(rng.integers(-1000, 1000, (128, m)), jnp.int32)
    row_sums = np.broadcast_to(np.asarray(rows, np.int64).sum(axis=1), (128, m))
    wanted = np.asarray(start) + values.T @ np.asarray(rows, np.int64).T
    scale = jnp.asarray(rng.standard_normal(128), jnp.float32)
    zero = jnp.asarray(rng.integers(-100, 100, 128), jnp.float32)
    totals = jnp.asarray(rng.standard_normal((128, m)), jnp.float32)

    def results():
        sums = integers.multiply_bytes(start, planes, x)
        of_rows = integers.add_row_sums(jnp.zeros_like(start), x)
        ends = [
            integers.add_scaled_integers(totals, sums, scale),
            integers.add_scaled_integers(totals, sums, scale, zero, of_rows),
        ]
        return sums, of_rows, ends

    with emulated_gpu(monkeypatch):
        emitted = results()
    for sums, of_rows, (plain_end, zero_end) in (emitted, results()):
        np.testing.assert_array_equal(sums, wanted)
        np.testing.assert_array_equal(of_rows, row_sums)
        factor = np.asarray(scale, np.float64)[:, None]
        assert error(plain_end, np.asarray(totals) + wanted * factor) < 1e-6
        corrected = wanted + np.asarray(zero)[:, None] * row_sums
        assert error(zero_end, np.asarray(totals) + corrected * factor) < 1e-6


@pytest.mark.parametrize(
    ("case", "m", "k", "n"),
    [
        (Case("int4", "group", 128), 9, 256, 128),
        slow(Case("int8", **CHANNEL), 33, 100, 72),
        slow(Case("int4", "group", 64, zero_point="integer", scale_dtype=np.float16), 16, 192, 128),
        slow(Case("int2", "group", 64, zero_point="half"), 8, 128, 256),
        longest(Case("int4", **CHANNEL), 1, 1408, 100),
        longest(Case("int4", "group", 128), 64, 384, 256),
        longest(Case("int8", "group", 64, zero_point="integer"), 9, 128, 128),
        longest(Case("int4", "channel", zero_point="integer", scale_dtype=np.float32), 9, 256, 128),
    ],
    ids=str,
)
def test_products(case, m, k, n):
    w, values = random_weight(case, k, n)
    x = codes(m, k)
    found = mma_matmul(x, w)
    assert found.dtype == jnp.float32
    assert found.shape[1:] == (m, n)
    assert error(found.sum(axis=0), exact(x, values)) < BOUND


@pytest.mark.slow
def test_experts():
    stack, values = random_weight(Case("int4", "group", 128), 256, 128, (3,))
    index = np.asarray([2] * 12 + [0, 1, 3, 0], np.int32)  # 3: of another device
    x = codes(16, 256)
    found = gathered_mma(x, stack, jnp.asarray(index)).sum(axis=0)
    wanted = np.stack(
        [exact(x[i], values[e]) if e < 3 else 0 * found[i] for i, e in enumerate(index)]
    )
    assert error(found, wanted) < BOUND


def test_codes_that_fill_no_bytes_say_so():
    w, _ = random_weight(Case("int3", **CHANNEL), 128, 128)
    with pytest.raises(ValueError, match="rows of bfloat16 or float16, found int8"):
        mma_matmul(codes(9, 128), w)
