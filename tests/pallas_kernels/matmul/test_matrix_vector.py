"""Matrix-vector kernels in the interpreter against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from canonical_weights import CASES, Case, generator, random_weight
from closeness import error
from covering import slow

from pallas_kernels.aot.gpu_targets import GPUS
from pallas_kernels.matmul.matrix_vector import (
    MatrixVectorConfig,
    choose_config,
    matrix_vector,
    matrix_vector_reference,
    tile_of,
)
from pallas_kernels.matmul.row_sources import Gated, Normed

BOUND = 5e-6
INT4 = Case("int4", "group", 128)
INT8 = Case("int8", "channel", scale_dtype=np.float32)
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float16)


# The first ways of an integer, a codebook, a float, a small float and the trellis.
QUICK = {
    next(i for i, case in enumerate(CASES) if case.format == name)
    for name in ("int4", "int3", "nf4", "float8_e4m3", "nvfp4", "cc2")
}


def rows(m, k, dtype=jnp.bfloat16, shift=0.25):
    """Rows whose mean is not zero: sums that a bias is multiplied by are not small."""
    values = generator("rows", m, k).normal(size=(m, k)) + shift
    return jnp.asarray(values, dtype)


def product(x, values):
    return np.asarray(x, np.float64) @ values


@pytest.mark.parametrize(
    ("case", "m", "dtype"),
    [
        (pytest.param if i in QUICK else slow)(case, (1, 2, 5)[i % 3], DTYPES[i % 3], id=str(case))
        for i, case in enumerate(CASES)
    ],
)
def test_every_format(case, m, dtype):
    k, n = 256, 256
    w, values = random_weight(case, k, n)
    x = rows(m, k, dtype)
    found = matrix_vector(x, w)
    assert found.dtype == jnp.float32
    assert found.shape[1:] == (m, n)
    assert error(found.sum(axis=0), product(x, values)) < BOUND
    assert error(matrix_vector_reference(x, w)[0], product(x, values)) < BOUND


@pytest.mark.parametrize("m", [1, *map(slow, range(2, 8)), 8])
def test_every_number_of_rows(m):
    w, values = random_weight(INT4, 256, 256)
    x = rows(m, 256)
    assert error(matrix_vector(x, w).sum(axis=0), product(x, values)) < BOUND


@pytest.mark.parametrize(
    ("case", "k", "n", "m"),
    [
        slow(INT4, 128, 128, 1),
        (INT4, 1408, 128, 1),
        (INT4, 384, 100, 3),
        slow(INT4, 640, 200, 2),
        slow(INT8, 100, 100, 1),
        (INT8, 130, 72, 8),
        (Case("int4", "channel", scale_dtype=np.float32), 300, 128, 6),
        (Case("int4", "group", 96), 192, 128, 2),
        slow(Case("int4", "group", 256), 512, 128, 1),
    ],
    ids=str,
)
def test_odd_shapes(case, k, n, m):
    w, values = random_weight(case, k, n)
    x = rows(m, k)
    found = matrix_vector(x, w)
    assert found.shape[-1] == n
    assert error(found.sum(axis=0), product(x, values)) < BOUND


@pytest.mark.parametrize("block_columns", [slow(128), 512])
@pytest.mark.parametrize("prefetch", [True, False])
def test_settings_change_no_result(block_columns, prefetch):
    w, values = random_weight(INT4, 512, 512)
    x = rows(1, 512)
    config = MatrixVectorConfig(
        block_columns=block_columns, split=2, step_rows=16, prefetch=prefetch
    )
    found = matrix_vector(x, w, config=config)
    assert found.shape == (2, 1, 512)
    assert error(found.sum(axis=0), product(x, values)) < BOUND


@pytest.mark.slow
def test_the_same_bits_in_every_run():
    w, _ = random_weight(INT4, 256, 256)
    x = rows(2, 256)
    first = matrix_vector(x, w)
    jax.clear_caches()
    assert np.asarray(first).tobytes() == np.asarray(matrix_vector(x, w)).tobytes()


def test_one_wrong_nibble_is_seen():
    w, values = random_weight(INT4, 512, 256)
    x = rows(1, 512)
    wrong = dataclasses.replace(w, words=w.words.at[3, 5].set(w.words[3, 5] ^ 0x10))
    found = np.asarray(matrix_vector(x, wrong).sum(axis=0), np.float64)
    off = np.abs(found - product(x, values)).max(axis=0) / np.abs(product(x, values)).max()
    assert np.flatnonzero(off > BOUND).tolist() == [5]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gated_rows(dtype):
    m, k = 2, 256
    w, values = random_weight(INT4, k, 128)
    partials = jnp.asarray(generator("gated").normal(size=(3, m, 2 * k)), jnp.float32)
    x = Gated(partials, dtype)
    gate, up = np.split(np.asarray(partials, np.float64).sum(axis=0), 2, axis=-1)
    expected = product(gate / (1 + np.exp(-gate)) * up, values)
    bound = BOUND if dtype == jnp.float32 else 2e-2
    assert error(matrix_vector(x, w).sum(axis=0), expected) < bound
    assert error(matrix_vector(x, w).sum(axis=0), product(x.value(), values)) < bound / 10


def test_normed_rows():
    m, k = 3, 384
    w, values = random_weight(INT4, k, 128)
    scale = jnp.asarray(generator("norm").uniform(0.5, 2, k), jnp.float32)
    x = Normed(rows(m, k, jnp.float32), scale, 1e-5)
    y = np.asarray(x.x, np.float64)
    y = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)
    assert error(matrix_vector(x, w).sum(axis=0), product(y, values)) < BOUND


def test_vmap_of_rows_and_of_weights():
    w, values = random_weight(INT4, 256, 128)
    x = jnp.stack([rows(2, 256, jnp.float32, shift) for shift in (0.0, 0.1, 0.2, 0.3, 0.4)])
    several = jax.vmap(lambda x: matrix_vector(x, w, split=2))(x)
    folded = jax.vmap(lambda x: matrix_vector(x, w, split=2))(x[:3])
    assert several.shape == (5, 2, 2, 128)
    assert error(several.sum(axis=1), product(x, values)) < BOUND
    assert np.array_equal(folded, several[:3])
    stack, stack_values = random_weight(INT4, 256, 128, (2,))
    found = jax.vmap(matrix_vector)(x[:2], stack)
    assert error(found.sum(axis=1), np.asarray(x[:2], np.float64) @ stack_values) < BOUND


@pytest.mark.parametrize("kind", ["array", "gated"])
def test_gradient_with_respect_to_rows(kind):
    w, values = random_weight(INT4, 256, 128)
    weights = jnp.asarray(generator("cotangent").normal(size=(2, 2, 128)), jnp.float32)
    x = rows(2, 256, jnp.float32)
    if kind == "gated":
        x = Gated(jnp.stack([jnp.tile(x, 2), jnp.tile(x + 1.0, 2)]), jnp.float32)

    def plain(x):
        y = x.value() if isinstance(x, Gated) else x
        slices = y.reshape(2, 2, 128), jnp.asarray(values, jnp.float32).reshape(2, 128, 128)
        return jnp.sum(jnp.einsum("msk,skn->smn", *slices) * weights)

    found = jax.grad(lambda x: jnp.sum(matrix_vector(x, w, split=2) * weights))(x)
    expected = jax.grad(plain)(x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(a, np.asarray(b, np.float64)) < BOUND


def test_defaults_fill_every_gpu():
    for k, n in ((4096, 4096), (4096, 28672), (14336, 4096), (2560, 3584), (8192, 10240)):
        layout = random_layout(k, n)
        for gpu in GPUS.values():
            for m in (1, 4, 8):
                config = choose_config(layout, m, gpu.multiprocessors)
                tile, split = tile_of(layout, m, config)
                programs = n // tile.columns * split
                assert n % tile.columns == 0
                assert split * tile.segments == layout.segments
                assert 4 * m * tile.segments * 128 <= 32 * 1024
                assert m > 1 or programs >= gpu.multiprocessors or split >= layout.segments // 2


def random_layout(k, n):
    w, _ = random_weight(INT4, 128, 128)
    return dataclasses.replace(w.layout, k=k, n=n)


def test_what_does_not_fit_says_so():
    w, _ = random_weight(INT4, 256, 128)
    with pytest.raises(ValueError, match=r"x \(1, 128\) needs a weight \[K=128, N\]"):
        matrix_vector(rows(1, 128), w)
    with pytest.raises(ValueError, match="x has 9 rows, expected 1 .. 8"):
        matrix_vector(rows(9, 256), w)
    with pytest.raises(ValueError, match="block_columns=256 must be 128, 256 or 512"):
        matrix_vector(rows(1, 256), w, block_columns=256)
    for step_rows in (0, 24, 40):
        config = MatrixVectorConfig(block_columns=128, split=1, step_rows=step_rows)
        with pytest.raises(ValueError, match=f"step_rows={step_rows} must be 8 .* power of two"):
            matrix_vector(rows(1, 256), w, config=config)
    with pytest.raises(ValueError, match="split=0, expected 1 or more"):
        matrix_vector(rows(1, 256), w, split=0)
    with pytest.raises(ValueError, match=r"expected rows x \[M, K\], found \(256,\)"):
        matrix_vector(rows(1, 256)[0], w)
    with pytest.raises(ValueError, match="expected float rows, found int8"):
        matrix_vector(rows(1, 256).astype(jnp.int8), w)
    with pytest.raises(ValueError, match=r"need a scale \[256\], found \(128,\)"):
        matrix_vector(Normed(rows(1, 256), jnp.ones((128,)), 1e-6), w)
    with pytest.raises(ValueError, match=r"partials \[split, M, 2 I\], found \(1, 1, 513\)"):
        matrix_vector(Gated(jnp.ones((1, 1, 513))), w)
