"""Derivatives of products are those of `x @ dequantize(w)`, in both modes, or are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.formats.qtensor import dequantize
from fdq.ops.prepared_weight import TransposedWeight
from tests.closeness import error
from tests.covering import longest, slow, slow_but
from tests.formats.cases import quantized
from tests.ops.test_matmul import decoded, rows

SCALES = {
    "int8": ("scale",),
    "int4-g64": ("scale",),
    "int8-g32-asym": ("scale",),
    "int4-g64-affine": ("scale", "offset"),
    "int2-g32-half": ("scale",),
    "fp8": ("scale",),
    "fp8-block": ("scale",),
    "nf4-g64-dq": ("super_scale", "scale_offset"),
    "nvfp4": ("global_scale",),
    "cc2": ("super_scale",),
}
varied = pytest.mark.parametrize("name", slow_but(("int8", "int4-g64", "cc2"), SCALES))


@varied
@pytest.mark.parametrize("m", [3, longest(1)])
def test_the_gradient_by_scales_is_that_through_the_decoded_weight(name, m, rng):
    q = quantized(name)
    x, g = rows(rng, m), rows(rng, m, 512)

    @functools.partial(jax.grad, argnums=2)
    def gradient(product, x, arrays):
        return jnp.sum(product(x, q.replace(**arrays)) * g)

    arrays = {array: getattr(q, array) for array in SCALES[name]}
    found = gradient(fdq.matmul, x, arrays)
    expected = gradient(lambda x, q: jnp.matmul(x, dequantize(q), precision="highest"), x, arrays)
    for array in arrays:
        assert found[array].dtype == arrays[array].dtype and np.any(np.asarray(expected[array]))
        assert error(found[array], np.asarray(expected[array], np.float64)) < 1e-5


def test_the_gradient_by_scales_under_quantized_rows_is_that_of_their_values(rng):
    q, x = quantized("int4-g64"), rows(rng, 3)
    codes, scale = fdq.ops.quantize_activation(x, fdq.ops.parse_activation("int8"))
    values = codes.astype(jnp.float32) * scale
    by = jax.grad(lambda s: fdq.matmul(x, q.replace(scale=s), activation="int8").sum())
    plain = jax.grad(lambda s: fdq.matmul(values, q.replace(scale=s)).sum())
    assert error(by(q.scale), np.asarray(plain(q.scale), np.float64)) < 1e-5


@pytest.mark.parametrize(("t", "picks"), [slow(3, 1), longest(40, 2)])
def test_the_gradient_by_scales_of_experts(t, picks, rng):
    q = jax.tree.map(lambda a: jnp.stack([a, a[:, ::-1]]), quantized("int4-g64"))
    x = rows(rng, t)
    index = jnp.asarray(rng.integers(0, 2, (t, picks)), jnp.int32)
    g = jnp.asarray(rng.standard_normal((t, picks, 512)), jnp.float32)

    def loss(scale):
        return jnp.sum(fdq.grouped_matmul(x, q.replace(scale=scale), index) * g)

    def plain(scale):
        w = dequantize(q.replace(scale=scale))[index]
        return jnp.sum(jnp.einsum("tk,tpkn->tpn", x, w, precision="highest") * g)

    found, expected = jax.jit(jax.grad(loss))(q.scale), jax.grad(plain)(q.scale)
    assert np.any(np.asarray(expected)) and found.dtype == q.scale.dtype
    assert error(found, np.asarray(expected, np.float64)) < 1e-5
    # What is not asked for is not refused: the rows alone, where codes and scales are small floats.
    small = jax.tree.map(lambda a: jnp.stack([a, a]), quantized("nvfp4"))
    dx = jax.grad(lambda x: fdq.grouped_matmul(x, small, index).sum())(x)
    assert error(dx, np.broadcast_to(picks * decoded("nvfp4").sum(1), x.shape)) < 1e-5


@pytest.mark.parametrize(
    ("name", "t", "picks"),
    [("int4-g64", 40, 2), slow("int4-g64", 3, 1), slow("nvfp4", 40, 2), slow("array", 40, 2)],
)
def test_both_modes_and_second_derivatives_of_experts(name, t, picks, rng):
    one = quantized("int8" if name == "array" else name, 128, 64)
    q = jax.tree.map(lambda a: jnp.stack([a, a[:, ::-1], a]), one)
    q = dequantize(q) if name == "array" else q
    w = np.asarray(dequantize(q) if name != "array" else q, np.float64)
    x, dx = rows(rng, t, 128) / 10, rows(rng, t, 128) / 10
    index = rng.integers(0, 2, (t, picks))  # nobody picks the last

    def product(x):
        return fdq.grouped_matmul(x, q, jnp.asarray(index, jnp.int32))

    def by_hand(x):
        return np.einsum("tk,tpkn->tpn", np.asarray(x, np.float64), w[index])

    def back(g):
        return np.einsum("tpn,tpkn->tk", g, w[index])

    gradient = jax.grad(lambda x: jnp.sin(product(x)).sum())

    @jax.jit
    def found(x, dx):
        along = jax.jvp(gradient, (x,), (dx,))[1]
        again = jax.grad(lambda x: jnp.vdot(gradient(x), dx))(x)
        return *jax.jvp(product, (x,), (dx,)), gradient(x), along, again

    change = back(-np.sin(by_hand(x)) * by_hand(dx))
    expected = by_hand(x), by_hand(dx), back(np.cos(by_hand(x))), change, change
    for one, value in zip(found(x, dx), expected, strict=True):
        assert error(one, value) < 1e-5


@pytest.mark.slow
def test_forward_mode_of_experts_by_scales_and_arrays(rng):
    q = jax.tree.map(lambda a: jnp.stack([a, a[:, ::-1]]), quantized("int4-g64", 128, 64))
    x, index = rows(rng, 5, 128), jnp.asarray([0, 1, 1, 0, 1], jnp.int32)
    values = np.asarray(dequantize(q), np.float64)[index]
    by_hand = np.einsum("tk,tkn->tn", np.asarray(x, np.float64), values)

    def of_scale(x, scale):
        return fdq.grouped_matmul(x, q.replace(scale=scale), index)

    def of_array(w):
        return fdq.grouped_matmul(x, w, index)

    @jax.jit
    def changes(x, scale, w):
        by_both = jax.jvp(of_scale, (x, scale), (x, scale * 2))[1]
        return by_both, jax.jvp(of_array, (w,), (3 * w,))[1]

    for dy in changes(x, q.scale, dequantize(q)):
        assert error(dy, 3 * by_hand) < 1e-5
    found = jax.jacfwd(jax.jit(lambda x: fdq.grouped_matmul(x, q, index[:1])))(x[:1])
    assert error(found[0, :, 0], values[0].T) < 5e-6


@varied
def test_forward_mode(name, rng):
    q, x, dx = quantized(name), rows(rng, 2), rows(rng, 2)
    y, dy = jax.jvp(lambda x: fdq.matmul(x, q), (x,), (dx,))
    assert error(y, np.asarray(x, np.float64) @ decoded(name)) < 5e-6
    assert error(dy, np.asarray(dx, np.float64) @ decoded(name)) < 5e-6
    for jacobian in (jax.jacfwd, jax.jacrev):
        found = jacobian(lambda x: fdq.matmul(x, q))(x[0])
        assert error(found, decoded(name).T) < 5e-6
    _, linear = jax.linearize(lambda x: fdq.matmul(x, q), x)
    back = jax.linear_transpose(linear, x)(y)[0]
    assert error(back, np.asarray(y, np.float64) @ decoded(name).T) < 5e-6


def test_both_modes_of_a_row_by_an_array_of_16_bits(rng):
    x, w = (rng.standard_normal(shape) for shape in ((1, 96), (96, 40)))
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in (x, w))
    wide_x, wide_w = (np.asarray(a, np.float64) for a in (x, w))

    def product(x, w):
        return fdq.matmul(x, w, out_dtype=jnp.float32)

    _, dy = jax.jvp(product, (x, w), (2 * x, 4 * w))
    assert error(dy, 6 * wide_x @ wide_w) < 5e-6
    dx, dw = jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1))(x, w)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    assert error(dx.astype(jnp.float32), wide_w.sum(1)[None]) < 1e-2
    assert error(dw.astype(jnp.float32), np.repeat(wide_x.T, 40, axis=1)) < 1e-2


@pytest.mark.parametrize("name", ["int4-g64", slow("int8"), slow("cc2")])
def test_transposes_of_products(name, rng):
    q, w = quantized(name), decoded(name)
    k, n = w.shape
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    index = jnp.asarray([0, 1, 1], jnp.int32)
    forward = rows(rng, 3, k)
    g = rows(rng, 3, n)
    for product in (
        lambda x: fdq.matmul(x, q),
        lambda x: fdq.matmul(x, q, activation="int8"),
        lambda x: x @ q,
        lambda x: fdq.einsum("mk,kn->mn", x, q),
        lambda x: jax.vmap(fdq.matmul, (0, None))(x, q),
        lambda x: fdq.grouped_matmul(x, stack, index),
        jax.linearize(jax.jit(lambda x: fdq.matmul(x, q)), forward)[1],
        # Where somebody's own code compiles, maps, or loops.
        jax.jit(lambda x: fdq.matmul(x, q, activation="int8")),
        jax.jit(lambda x: x @ q),
        jax.jit(lambda x: fdq.einsum("mk,kn->mn", x, q)),
        jax.vmap(jax.jit(lambda x: x @ q)),
        jax.jit(lambda x: jax.vmap(fdq.matmul, (None, 0))(x, stack).sum(0) / 2),
        jax.checkpoint(jax.jit(lambda x: x @ q)),
        jax.jit(lambda x: fdq.grouped_matmul(x, stack, index)),
        lambda x: jax.lax.map(lambda row: row @ q, x),
    ):
        back = jax.linear_transpose(product, forward)(g)[0]
        assert error(back, np.asarray(g, np.float64) @ w.T) < 5e-6
    over_n = jax.jit(lambda x: fdq.einsum("mn,kn->mk", x, q))
    back = jax.linear_transpose(over_n, g)(forward)[0]
    assert error(back, np.asarray(forward, np.float64) @ w) < 5e-6


def test_transposes_with_respect_to_a_weight_are_refused():
    q, x = quantized("int8"), jnp.ones((1, 256))
    by_scale = jax.jit(lambda scale: fdq.matmul(x, q.replace(scale=scale)))
    with pytest.raises(NotImplementedError, match="with respect to its rows only"):
        jax.linear_transpose(by_scale, q.scale)(jnp.ones((1, 512)))


@pytest.mark.slow
def test_forward_mode_over_scales_activations_and_layers(rng):
    q, x = quantized("int4-g64", 256, 256), rows(rng, 2)
    change = jax.tree.map(lambda a: jnp.full_like(a, 0.5), q.scale)
    dy = jax.jvp(lambda s: fdq.matmul(x, q.replace(scale=s)), (q.scale,), (change,))[1]
    levels = q.replace(scale=change)
    assert error(dy, np.asarray(fdq.matmul(x, levels), np.float64)) < 5e-6
    dy = jax.jvp(lambda x: fdq.matmul(x, q, activation="int8"), (x,), (x,))[1]
    assert error(dy, np.asarray(fdq.matmul(x, q), np.float64)) < 5e-6

    stack = jax.tree.map(lambda a: jnp.stack([a, a]), q)

    def network(x):
        step = jax.checkpoint(lambda x, q: (jnp.tanh(fdq.matmul(x, q)), None))
        return jax.lax.scan(step, x, stack)[0].sum()

    found = jax.jvp(network, (x,), (x,))[1]
    assert found == pytest.approx(float(jnp.vdot(jax.grad(network)(x), x)), rel=1e-4)
    # Both modes at once.
    assert jax.jit(jax.hessian(lambda x: jnp.tanh(fdq.matmul(x, q)).sum()))(x[0]).any()


def test_what_has_no_derivative_is_refused(rng):
    q, x = quantized("int8"), rows(rng, 2)

    def loss(x, q, scale):
        spec = fdq.ActivationSpec(format="int8", granularity="tensor", dynamic=False)
        return fdq.matmul(x, q, activation=spec, activation_scale=scale, path="a.b").sum()

    scale = jnp.float32(0.1)
    assert jax.grad(loss)(x, q, scale).shape == x.shape
    with pytest.raises(NotImplementedError, match=r"a\.b: activation_scale is calibrated"):
        jax.grad(loss, 2)(x, q, scale)
    laid_out = TransposedWeight.of(q)
    assert jax.grad(loss)(x, laid_out, scale).shape == x.shape
    with pytest.raises(NotImplementedError, match="layout 'transposed' has no derivative"):
        jax.grad(loss, 1, allow_int=True)(x, laid_out, scale)
    for name, array in (("nvfp4", "scale"), ("mxfp4", "scale"), ("fp8", "codes")):
        small = quantized(name)
        for product in (fdq.matmul, lambda x, q: x @ dequantize(q)):
            with pytest.raises(TypeError, match=f"The {array} of this QTensor, float8_.*no usable"):
                jax.grad(lambda q: product(x, q).sum(), allow_int=True)(small)  # noqa: B023


def bytes_of(kept):
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept.jaxpr.outvars)


def test_a_gradient_keeps_the_codes_and_not_the_decoded_weight(rng):
    q, x = quantized("int4-g64"), rows(rng, 3)
    kept = jax.make_jaxpr(lambda x, q: jax.vjp(lambda x: fdq.matmul(x, q), x)[1])(x, q)
    assert bytes_of(kept) < 2 * q.nbytes
    stack = jax.tree.map(lambda a: jnp.stack([a, a, a]), q)
    for t in (3, 20):  # a row at a time, and in tiles

        def of_scale(scale, q, x):
            return fdq.grouped_matmul(x, q.replace(scale=scale), jnp.arange(x.shape[0]) % 3)

        x = rows(rng, t)
        kept = jax.make_jaxpr(lambda x, q: jax.vjp(of_scale, q.scale, q, x)[1])(x, stack)
        assert bytes_of(kept) < 3 * stack.nbytes
