"""Codes whose rows are in another order than the weight's, as GPTQ leaves them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fdq
from fdq.formats import FORMATS
from fdq.ops.activation import quantize_activation
from fdq.ops.prepared_weight import WordsWeight
from tests.covering import slow

K, N, E = 128, 64, 3


def ordered(rng, *lead, scheme="W4A16-g32-asym"):
    """A QTensor `[*lead, K, N]`, each matrix with an order of its own, and what it stands for."""
    q = fdq.quantize(jnp.asarray(rng.standard_normal((*lead, K, N)).astype(np.float32)), scheme)
    order = np.argsort(rng.random((*lead, K)), axis=-1).astype(np.int32)
    spec = dataclasses.replace(q.spec, row_order=True)
    arrays = q.arrays() | {"row_order": jnp.asarray(order)}
    decoded, weight = np.asarray(fdq.dequantize(q)), np.empty((*lead, K, N), np.float32)
    np.put_along_axis(weight, order[..., None], decoded, axis=-2)
    return fdq.QTensor(spec=spec, padding=q.padding, **arrays), weight


@pytest.mark.parametrize("scheme", ["W4A16-g32-asym", slow("W3A16-g64"), slow("W8A16-g32")])
def test_a_matrix_is_what_its_rows_say(scheme, rng):
    q, w = ordered(rng, scheme=scheme)
    x, y = rng.standard_normal((3, K)).astype(np.float32), rng.standard_normal((3, N))
    y = y.astype(np.float32)
    np.testing.assert_array_equal(fdq.dequantize(q), w)
    np.testing.assert_allclose(fdq.matmul(x, q), x @ w, atol=1e-4)
    np.testing.assert_allclose(fdq.einsum("bn,kn->bk", y, q), y @ w.T, atol=1e-4)
    rows = fdq.take(q, jnp.array([3, -1, K]))
    np.testing.assert_array_equal(rows, np.stack([w[3], w[-1], np.full(N, np.nan)]))
    codes, step = quantize_activation(x, fdq.ActivationSpec(format="int8"))
    values = np.asarray(codes, np.float32) * step
    np.testing.assert_allclose(fdq.matmul(x, q, activation="int8"), values @ w, atol=1e-3)


def test_derivatives_are_those_of_the_weight(rng):
    q, w = ordered(rng)
    x, y = (rng.standard_normal((3, size)).astype(np.float32) for size in (K, N))
    back = jax.linear_transpose(lambda x: fdq.matmul(x, q), jax.ShapeDtypeStruct((3, K), x.dtype))
    np.testing.assert_allclose(back(jnp.asarray(y))[0], y @ w.T, atol=1e-4)
    by_x, by_scale = jax.grad(
        lambda x, scale: (fdq.matmul(x, q.replace(scale=scale)) * y).sum(), argnums=(0, 1)
    )(jnp.asarray(x), q.scale)
    np.testing.assert_allclose(by_x, y @ w.T, atol=1e-4)
    wanted = jax.grad(lambda scale: (x @ fdq.dequantize(q.replace(scale=scale)) * y).sum())(q.scale)
    assert np.abs(wanted.astype(np.float32)).max() > 1
    np.testing.assert_allclose(
        by_scale.astype(np.float32), wanted.astype(np.float32), rtol=1e-2, atol=1e-2
    )


@pytest.mark.slow
def test_a_stack_has_an_order_a_matrix(rng):
    q, w = ordered(rng, E)
    x = rng.standard_normal((4, K)).astype(np.float32)
    np.testing.assert_array_equal(fdq.dequantize(q), w)
    np.testing.assert_array_equal(fdq.dequantize(q[1]), w[1])
    every = np.einsum("tk,ekn->etn", x, w)
    index = jnp.array([[0, 2], [1, 1], [2, 0], [0, 1]])
    wanted = every[index, np.arange(4)[:, None]]
    np.testing.assert_allclose(fdq.grouped_matmul(x, q, index), wanted, atol=1e-4)


@pytest.mark.slow
def test_a_stack_is_mapped_over_and_picked_from(rng):
    q, w = ordered(rng, E)
    x, index = rng.standard_normal((4, K)).astype(np.float32), jnp.array([2, 0, 1, 1])
    every = np.einsum("tk,ekn->etn", x, w)
    np.testing.assert_allclose(jax.vmap(fdq.matmul, in_axes=(None, 0))(x, q), every, atol=1e-4)
    picked = fdq.grouped_matmul(x, q, index)
    np.testing.assert_allclose(picked, every[index, np.arange(4)], atol=1e-4)


def test_it_stays_through_the_layout_of_kernels(rng):
    q, w = ordered(rng)
    words = WordsWeight.of(q)
    for name, array in words.canonical().arrays().items():
        np.testing.assert_array_equal(array, q.arrays()[name])
    x = rng.standard_normal((2, K)).astype(np.float32)
    np.testing.assert_allclose(fdq.matmul(x, words), x @ w, atol=1e-4)
    np.testing.assert_array_equal(fdq.take(words, jnp.array([3, -1])), w[[3, -1]])
    np.testing.assert_array_equal(fdq.dequantize(words), w)


@pytest.mark.parametrize("axes", [slow(AxisType.Explicit), slow(AxisType.Auto)])
def test_columns_may_be_sharded(axes, rng):
    (q, w), (stack, weights) = ordered(rng), ordered(rng, 2)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axes,))

    def placed(q, *entries):
        def put(name, a):
            columns = () if name == "row_order" else (*[None] * (a.ndim - 1), "x")
            spec = PartitionSpec(*(entries or columns))
            return jax.device_put(a, NamedSharding(mesh, spec))

        return q.replace(**{name: put(name, a) for name, a in q.arrays().items()})

    x, index = rng.standard_normal((3, K)).astype(np.float32), jnp.array([1, 0, 1])
    picked = np.einsum("tk,tkn->tn", x, weights[np.asarray(index)])
    with jax.set_mesh(mesh):
        found = jax.jit(fdq.matmul)(jnp.asarray(x), placed(q))
        np.testing.assert_array_equal(jax.jit(fdq.dequantize)(placed(stack)), weights)
        np.testing.assert_array_equal(fdq.take(placed(q), jnp.array([3])), w[[3]])
    np.testing.assert_allclose(found, x @ w, atol=1e-4)
    by_expert = fdq.grouped_matmul(jnp.asarray(x), placed(stack, "x"), index)
    np.testing.assert_allclose(by_expert, picked, atol=1e-4)


def test_it_costs_its_bytes_and_is_part_of_the_name(rng):
    q, _ = ordered(rng)
    assert str(q.spec) == "W4-g32-asym-rows"
    assert fdq.WeightSpec.parse(str(q.spec)) == q.spec
    assert (
        q.bits_per_weight == FORMATS["int4"].bits_per_weight(q.spec, (K, N)) == 5.25 + 32 / N - 0.5
    )
    abstract = fdq.quantize(jax.ShapeDtypeStruct((2, K, N), jnp.float32), str(q.spec))
    assert abstract.row_order.shape == (2, K)
    assert "rows in another order" in repr(q)


def test_quantizers_never_make_one(tmp_path, rng):
    with pytest.raises(ValueError, match="Quantizers choose none"):
        fdq.quantize(jnp.ones((K, N)), "W4A16-g32-rows")
    with pytest.raises(ValueError, match="row_order is for integers in groups only"):
        fdq.WeightSpec(format="int8", row_order=True)
    with pytest.raises(ValueError, match="'MXFP4A16-rows'|row_order"):
        fdq.Scheme.parse("WMXFP4A16-rows")


def test_a_checkpoint_keeps_it(tmp_path, rng):
    q, _ = ordered(rng)
    fdq.save({"w": q}, tmp_path / "kept")
    kept = fdq.load(tmp_path / "kept")["w"]
    assert kept.spec == q.spec
    for name, array in kept.arrays().items():
        np.testing.assert_array_equal(array, q.arrays()[name])
