"""grouped_matmul: each row times the weight of its expert; only picked experts are read."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.formats.qtensor import dequantize
from fdq.quantizers import quantize_array
from tests.closeness import error
from tests.formats.cases import PRODUCTS

E, K, N = 6, 128, 96


@functools.cache
def experts(name):
    w = np.random.default_rng(5).standard_normal((E, K, N))
    return quantize_array(jnp.asarray(w, jnp.float32), PRODUCTS[name], method="absmax")


def problem(rng, t):
    x = jnp.asarray(rng.standard_normal((t, K)), jnp.float32)
    index = rng.integers(0, E, t)
    index[index == 3] = 2  # an expert that nobody picks
    return x, jnp.asarray(index, jnp.int32)


def expected(x, w, index):
    return np.einsum("tk,tkn->tn", np.asarray(x, np.float64), np.asarray(w, np.float64)[index])


grouped = jax.jit(fdq.grouped_matmul, static_argnames="activation")


@pytest.mark.parametrize("t", [1, 4, 100])
@pytest.mark.parametrize("name", ["int8", "int4-g64", "fp8-block"])
def test_equals_the_picked_weights(name, t, rng):
    q = experts(name)
    x, index = problem(rng, t)
    assert error(grouped(x, q, index), expected(x, dequantize(q), index)) < 5e-6


@pytest.mark.parametrize("t", [4, 100])
def test_activation_quantization(t, rng):
    q = experts("int4-g64")
    x, index = problem(rng, t)
    codes, scale = ops.quantize_activation(x, ops.parse_activation("int8"))
    wanted = expected(np.asarray(codes) * np.asarray(scale, np.float64), dequantize(q), index)
    assert error(grouped(x, q, index, activation="int8"), wanted) < 1e-6


def test_array_weights_and_gradients(rng):
    w = dequantize(experts("int8"))
    for t in (4, 40):
        x, index = problem(rng, t)
        loss = jax.jit(jax.grad(lambda x, w, i: fdq.grouped_matmul(x, w, i).sum(), (0, 1)))
        dx, dw = loss(x, w, index)
        assert error(dx, np.asarray(w, np.float64).sum(2)[index]) < 5e-6
        by_hand = np.zeros((E, K))
        np.add.at(by_hand, np.asarray(index), np.asarray(x, np.float64))
        assert error(dw, np.repeat(by_hand[:, :, None], N, axis=2)) < 5e-6
        q = experts("int8")
        dx = jax.jit(jax.grad(lambda x, q, i: fdq.grouped_matmul(x, q, i).sum()))(x, q, index)
        assert error(dx, np.asarray(w, np.float64).sum(2)[index]) < 5e-6


def test_vmap(rng):
    q = experts("int4-g64")
    x, index = problem(rng, 8)
    y = jax.vmap(fdq.grouped_matmul, in_axes=(0, None, 0))(
        x.reshape(2, 4, K), q, index.reshape(2, 4)
    )
    assert error(y.reshape(8, N), expected(x, dequantize(q), index)) < 5e-6


@pytest.mark.parametrize("t", [4, 100])
def test_only_picked_experts_are_read(t):
    """In the compiled program, whatever reads the stacked codes slices one expert of them."""
    q = experts("int4-g64")
    x, index = jax.ShapeDtypeStruct((t, K), jnp.float32), jax.ShapeDtypeStruct((t,), jnp.int32)
    compiled = grouped.lower(x, q, index).compile()
    stack, one = f"u8[{E},{K // 2},{N}]", f"u8[1,{K // 2},{N}]"
    results = re.findall(r"= (\S+?\])\S* (\S+?)\(", compiled.as_text())
    readers = {op for shape, op in results if shape == stack}
    assert readers <= {"parameter", "get-tuple-element"}, readers
    assert (one, "dynamic-slice") in results
    assert not [s for s, _ in results if s.startswith((f"f32[{E},{K}", f"f32[{E},{K // 2}"))]
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * K * N * E + 4 * 2 * (t + 16) * (
        K + N
    )


def test_wrong_shapes():
    q = experts("int4-g64")
    with pytest.raises(ValueError, match="expected one expert a row"):
        fdq.grouped_matmul(jnp.ones((3, K)), q, jnp.zeros((2,), jnp.int32))
    with pytest.raises(ValueError, match=r"x \[T, K\] and w \[E, K, N\]"):
        fdq.grouped_matmul(jnp.ones((3, K + 1)), q, jnp.zeros((3,), jnp.int32))
