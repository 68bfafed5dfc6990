"""The tensor cores' kernel in the interpreter against NumPy in float64; see `test_mma_products`."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from canonical_weights import Case, generator, random_weight
from closeness import error
from covering import longest, slow

from pallas_kernels.aot.gpu_targets import GPUS
from pallas_kernels.matmul.mma import MmaConfig, choose_mma_config, mma_matmul, tile_of, unsupported
from pallas_kernels.matmul.row_sources import Gated, Normed

BOUND = 5e-6
BF16, F16 = jnp.bfloat16, jnp.float16
INT4 = Case("int4", "group", 128)
INT8 = Case("int8", "channel", scale_dtype=np.float32)
ZEROS = Case("int4", "group", 64, zero_point="integer", scale_dtype=np.float16)


def rows(m, k, dtype=BF16):
    """Rows whose mean is not zero: sums that a bias is multiplied by are not small."""
    return jnp.asarray(generator("rows", m, k).normal(size=(m, k)) + 0.25, dtype)


def product(x, values):
    return np.asarray(x, np.float64) @ values


@pytest.mark.parametrize(
    ("case", "m", "k", "n", "dtype"),
    [
        (INT4, 9, 256, 128, BF16),
        slow(INT4, 1, 1408, 100, F16),
        longest(INT4, 64, 384, 256, BF16),
        slow(INT8, 33, 100, 72, BF16),
        longest(INT8, 8, 300, 256, F16),
        slow(Case("nvfp4", "group", 16, scale_dtype=ml_dtypes.float8_e4m3fn), 9, 256, 128, BF16),
        longest(ZEROS, 16, 192, 128, BF16),
        longest(Case("int8", "group", 64, zero_point="integer"), 9, 128, 128, BF16),
        longest(Case("int4", "group", 32, zero_point="half"), 9, 96, 128, F16),
    ],
    ids=str,
)
def test_products(case, m, k, n, dtype):
    w, values = random_weight(case, k, n)
    x = rows(m, k, dtype)
    found = mma_matmul(x, w)
    assert found.dtype == jnp.float32
    assert found.shape[1:] == (m, n)
    assert error(found.sum(axis=0), product(x, values)) < BOUND


@pytest.mark.slow
@pytest.mark.longest
def test_settings_change_no_result():
    w, values = random_weight(INT4, 512, 256)
    x = rows(9, 512)
    found = mma_matmul(x, w, config=MmaConfig(block_columns=256, split=2))
    assert found.shape == (2, 9, 256)
    assert error(found.sum(axis=0), product(x, values)) < BOUND


@pytest.mark.slow
def test_rows_that_are_finished_first():
    w, values = random_weight(INT4, 256, 128)
    partials = jnp.asarray(generator("gated").normal(size=(3, 9, 512)), jnp.float32)
    scale = jnp.asarray(generator("norm").uniform(0.5, 2, 256), BF16)
    for x in (Gated(partials, BF16), Normed(rows(9, 256), scale, 1e-5)):
        assert error(mma_matmul(x, w).sum(axis=0), product(x.value(), values)) < BOUND


@pytest.mark.slow
@pytest.mark.longest
def test_gradient_and_vmap():
    w, values = random_weight(INT4, 128, 128)
    x = jnp.stack([rows(9, 128), 2 * rows(9, 128)])
    batch = jax.vmap(lambda x: mma_matmul(x, w))(x)
    assert error(batch.sum(axis=1), product(x, values)) < BOUND
    gradient = jax.grad(lambda x: mma_matmul(x, w).sum())(x[0])
    assert gradient.dtype == BF16
    assert error(gradient, np.broadcast_to(values.sum(axis=1), (9, 128))) < 2.0**-8


def test_defaults_fill_every_gpu():
    layout = random_weight(INT4, 128, 128)[0].layout
    for k, n in ((4096, 4096), (4096, 28672), (14336, 4096), (2560, 3584)):
        big = dataclasses.replace(layout, k=k, n=n)
        for gpu in GPUS.values():
            for m in (1, 9, 33, 64):
                config = choose_mma_config(big, m, gpu.multiprocessors)
                tile, split = tile_of(big, m, BF16, config)
                assert split * tile.segments == big.segments and tile.rows % 8 == 0
                programs = n // 128 // tile.chunks * split
                assert programs >= gpu.multiprocessors or split >= 4 or gpu.multiprocessors > 132


def test_what_does_not_fit_says_so():
    w, _ = random_weight(INT4, 256, 128)
    for x, message in (
        (rows(65, 256), "65 rows, expected 1 .. 64"),
        (rows(9, 128), "needs a weight .K=128"),
        (rows(9, 256, jnp.float32), "bfloat16 or float16, or int8, found float32"),
    ):
        with pytest.raises(ValueError, match=message):
            mma_matmul(x, w)
    with pytest.raises(ValueError, match="block_columns 128 or 256"):
        mma_matmul(rows(9, 256), w, config=MmaConfig(block_columns=512, split=1))
    short, _ = random_weight(Case("int8", "group", 8), 64, 128)
    assert "are of 2 units" in str(unsupported(short.layout, BF16))
