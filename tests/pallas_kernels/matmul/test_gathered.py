"""Products with picked experts in the interpreter against NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from canonical_weights import Case, generator, random_weight
from closeness import error
from covering import slow

from pallas_kernels.matmul.gathered import (
    gathered_matrix_vector,
    gathered_matrix_vector_reference,
)
from pallas_kernels.matmul.matrix_vector import MatrixVectorConfig
from pallas_kernels.matmul.row_sources import Gated

BOUND = 5e-6
INT4 = Case("int4", "group", 128)
INT8 = Case("int8", "channel", scale_dtype=np.float32)
NVFP4 = Case("nvfp4", "group", 16, scale_dtype=ml_dtypes.float8_e4m3fn)
EXPERTS = 5


def rows(t, k, dtype=jnp.bfloat16):
    return jnp.asarray(generator("rows", t, k).normal(size=(t, k)) + 0.25, dtype)


def picks(count):
    """Experts in no order, some twice, the first and the last among them."""
    index = generator("picks", count).integers(0, EXPERTS, count)
    index[0], index[-1] = EXPERTS - 1, 0
    return jnp.asarray(index, jnp.int32)


def expected(x, values, index):
    per_row = len(index) // len(x)
    x = np.asarray(x, np.float64)
    return np.stack([x[p // per_row] @ values[e] for p, e in enumerate(np.asarray(index))])


@pytest.mark.parametrize(
    ("case", "t", "top_k", "k", "n"),
    [slow(INT4, 1, 2, 256, 128), slow(INT4, 3, 2, 128, 200), (INT8, 2, 1, 128, 72)],
    ids=str,
)
def test_each_pick_reads_its_expert(case, t, top_k, k, n):
    w, values = random_weight(case, k, n, (EXPERTS,))
    x, index = rows(t, k), picks(t * top_k)
    found = gathered_matrix_vector(x, w, index)
    assert found.shape[1:] == (t * top_k, n)
    assert error(found.sum(axis=0), expected(x, values, index)) < BOUND
    reference = gathered_matrix_vector_reference(x, w, index)
    assert error(reference[0], expected(x, values, index)) < BOUND


def test_a_shared_weight_rides_along():
    w, values = random_weight(INT4, 256, 128, (EXPERTS,))
    shared, shared_values = random_weight(INT4, 256, 256)
    x, index = rows(2, 256), picks(4)
    found, others = gathered_matrix_vector(x, w, index, shared=(x, shared))
    assert error(found.sum(axis=0), expected(x, values, index)) < BOUND
    assert others.shape[1:] == (2, 256)
    assert error(others.sum(axis=0), np.asarray(x, np.float64) @ shared_values) < BOUND
    pair = gathered_matrix_vector_reference(x, w, index, (x, shared))
    assert error(pair[1][0], np.asarray(x, np.float64) @ shared_values) < BOUND


def test_down_products_gate_their_rows():
    """Of picks (each its own row) and of the shared experts, whose rows are wider."""
    w, values = random_weight(INT4, 128, 256, (EXPERTS,))
    shared, shared_values = random_weight(INT4, 256, 256)
    index = picks(4)
    normal = generator("gate").normal
    x = Gated(jnp.asarray(normal(size=(2, 4, 256)), jnp.float32), jnp.float32)
    y = Gated(jnp.asarray(normal(size=(3, 2, 512)), jnp.float32), jnp.float32)

    def value(g):
        gate, up = np.split(np.asarray(g.partials, np.float64).sum(axis=0), 2, axis=-1)
        return gate / (1 + np.exp(-gate)) * up

    found, others = gathered_matrix_vector(x, w, index, shared=(y, shared))
    assert error(found.sum(axis=0), expected(value(x), values, index)) < BOUND
    assert error(others.sum(axis=0), value(y) @ shared_values) < BOUND


@pytest.mark.slow
def test_a_whole_layer_is_the_layer():
    """Gate and up, then down: what a decode step launches, with a format of short groups."""
    hidden, inner = 128, 128
    up, up_values = random_weight(NVFP4, hidden, 2 * inner, (EXPERTS,))
    down, down_values = random_weight(NVFP4, inner, hidden, (EXPERTS,))
    x, index = rows(2, hidden, jnp.float32), picks(4)
    config = MatrixVectorConfig(block_columns=128, split=2, step_rows=16)
    partials = gathered_matrix_vector(x, up, index, config=config)
    y = gathered_matrix_vector(Gated(partials, jnp.float32), down, index).sum(axis=0)
    gate, linear = np.split(expected(x, up_values, index), 2, axis=-1)
    middle = gate / (1 + np.exp(-gate)) * linear
    assert error(y, expected(middle, down_values, index)) < BOUND


def test_the_wrong_expert_is_seen():
    w, values = random_weight(INT4, 256, 128, (EXPERTS,))
    x = rows(2, 256)
    found = gathered_matrix_vector(x, w, jnp.asarray([1, 2], jnp.int32)).sum(axis=0)
    wrong = expected(x, values, np.asarray([1, 3]))
    assert error(found[:1], wrong[:1]) < BOUND
    assert error(found[1:], wrong[1:]) > 0.1


@pytest.mark.slow
def test_vmap_and_gradient():
    w, values = random_weight(INT4, 256, 128, (EXPERTS,))
    x, index = rows(1, 256, jnp.float32), picks(2)
    both = jnp.stack([x, x + 1.0])
    found = jax.vmap(lambda x: gathered_matrix_vector(x, w, index))(both)
    for i in range(2):
        assert error(found[i].sum(axis=0), expected(both[i], values, index)) < BOUND
    weights = jnp.asarray(generator("cotangent").normal(size=(2, 128)), jnp.float32)
    gradient = jax.grad(
        lambda x: jnp.sum(gathered_matrix_vector(x, w, index).sum(axis=0) * weights)
    )(x)
    by_hand = sum(np.asarray(weights[p], np.float64) @ values[e].T for p, e in enumerate(index))
    assert error(gradient, by_hand[None]) < BOUND


def test_what_does_not_fit_says_so():
    w, _ = random_weight(INT4, 256, 128, (EXPERTS,))
    with pytest.raises(ValueError, match=r"needs w \[E, K=128, N\] and index"):
        gathered_matrix_vector(rows(2, 128), w, picks(4))
    with pytest.raises(ValueError, match="P a multiple of T=3"):
        gathered_matrix_vector(rows(3, 256), w, picks(4))
    with pytest.raises(ValueError, match="need a weight"):
        gathered_matrix_vector(rows(1, 256), w, picks(2), shared=(rows(1, 256), w))
