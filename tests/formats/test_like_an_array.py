"""A quantized weight where an array stood: operators, indices, einsum, rows of a table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import nn
from fdq.formats.qtensor import dequantize
from fdq.ops.matmul import transposed
from fdq.ops.prepared_weight import TransposedWeight
from tests.closeness import error
from tests.covering import slow_but
from tests.formats.cases import PRODUCTS, quantized

every_product = pytest.mark.parametrize(
    "name", slow_but(("int8", "int4-g64", "int3-g64", "int8-g32-asym", "nvfp4", "cc2"), PRODUCTS)
)


@pytest.fixture
def stack():
    return jax.tree.map(lambda a: jnp.stack([a, a[:, ::-1], a]), quantized("int4-g64"))


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_the_product_is_that_of_matmul(stack, rng):
    q, x = stack[0], normal(rng, 2, 3, 256)
    w = np.asarray(dequantize(q), np.float64)
    for product in (
        x @ q,
        np.asarray(x) @ q,
        jax.jit(lambda x, q: x @ q)(x, q),
        jax.vmap(lambda x: x @ q)(x),
        x @ nn.boxed(q),
    ):
        assert isinstance(product, jax.Array) and product.dtype == jnp.float32
        assert error(product, np.asarray(x, np.float64) @ w) < 5e-6
    assert error(x[0, 0] @ q, np.asarray(x[0, 0], np.float64) @ w) < 5e-6
    assert (x.astype(jnp.bfloat16) @ q).dtype == jnp.bfloat16
    q8 = quantized("int8")
    assert error(x @ TransposedWeight.of(q8), np.asarray(x @ dequantize(q8), np.float64)) < 5e-6
    with pytest.raises(TypeError, match=r"QTensor\(\[256, 512\].* is the right operand"):
        _ = q @ x
    with pytest.raises(ValueError, match=r"x \[..., K\] and w \[K, N\]"):
        _ = x[..., :255] @ q


def test_products_with_a_stack(stack, rng):
    x = normal(rng, 3, 2, 256)
    w = np.asarray(dequantize(stack), np.float64)
    assert error(x @ stack, np.asarray(x, np.float64) @ w) < 5e-6
    assert error(x[0] @ stack, np.asarray(x[0], np.float64) @ w) < 5e-6
    with pytest.raises(ValueError, match=r"expected x \[K\], \[M, K\] or \[3, M, K\]"):
        _ = x[:2] @ stack


def test_leading_axes_are_indexed(stack):
    whole = np.asarray(dequantize(stack))
    for index in (1, -1, slice(0, 2), np.array([2, 0]), (1,), (slice(1, None), ...), ..., ()):
        np.testing.assert_array_equal(np.asarray(dequantize(stack[index])), whole[index])
    traced = jax.jit(lambda q, i: dequantize(q[i]))(stack, 1)
    np.testing.assert_array_equal(np.asarray(traced), whole[1])
    assert len(stack) == 3 and [q.shape for q in stack] == [(256, 512)] * 3
    for index in (3, -4):
        with pytest.raises(IndexError, match="out of range for an axis of 3"):
            stack[index]
    for q, index in ((stack, (0, 1)), (stack[0], 0), (stack[0], slice(2)), (stack, None)):
        with pytest.raises(IndexError, match=r"leading axes only.*fdq\.take"):
            q[index]
    assert stack[0]
    for use in (len, iter, list):
        with pytest.raises(TypeError, match="is one matrix"):
            use(stack[0])


def test_it_says_what_it_is(stack):
    assert (stack.dtype, stack.ndim, stack.shape) == (jnp.float32, 3, (3, 256, 512))
    assert stack.astype(jnp.bfloat16).dtype == jnp.bfloat16
    for name in ("T", "mT"):
        with pytest.raises(TypeError, match=r"no transpose.*fdq\.einsum"):
            getattr(stack, name)


@pytest.mark.parametrize(
    ("equation", "x", "experts"),
    [
        ("btk,kn->btn", (2, 3, 256), False),
        ("k,kn->n", (256,), False),
        ("kb,kn->nb", (256, 2), False),
        ("...k,kn->...n", (2, 3, 256), False),
        ("etk,ekn->etn", (3, 2, 256), True),
        ("tke,ekn->nte", (2, 256, 3), True),
        ("tk,ekn->etn", (2, 256), True),
        ("btn,kn->btk", (2, 3, 512), False),
        ("etn,ekn->tke", (3, 2, 512), True),
    ],
)
def test_einsum(equation, x, experts, stack, rng):
    q, x = stack if experts else stack[0], normal(rng, *x)
    expected = np.einsum(equation, np.asarray(x, np.float64), np.asarray(dequantize(q), np.float64))
    assert error(fdq.einsum(equation, x, q), expected) < 5e-6


def test_einsum_refuses_what_is_no_product(stack):
    x, q = jnp.ones((2, 256)), stack[0]
    for equation in ("bk,kn->b", "bk,kn->bkn", "bn,kn->bn", "bk,nk->bnk", "bk,kn->bnn"):
        with pytest.raises(ValueError, match="no product with a quantized weight"):
            fdq.einsum(equation, x, q)
    for equation in ("bk->b", "bk,kn,nm->bm", "bk,kn"):
        with pytest.raises(ValueError, match="cannot read"):
            fdq.einsum(equation, x, q)
    with pytest.raises(ValueError, match="gives x the axes b, t, k, each once; it has 2"):
        fdq.einsum("btk,kn->btn", x, q)
    assert fdq.einsum("bk,kn->bn", x, dequantize(q)).shape == (2, 512)


@every_product
def test_take_gives_the_rows_asked_for(name, rng):
    q = quantized(name)
    ids = jnp.asarray(rng.integers(0, 256, (2, 5)))
    whole = np.asarray(dequantize(q), np.float64)
    assert error(fdq.take(q, ids), whole[np.asarray(ids)]) < 1e-6
    rows = jax.jit(functools.partial(fdq.take, dtype=jnp.bfloat16))(q, ids[0])
    assert rows.dtype == jnp.bfloat16 and error(rows, whole[np.asarray(ids[0])]) < 1e-2


def test_rows_out_of_range(stack):
    q = stack[0]
    whole, ids = np.asarray(dequantize(q)), jnp.array([-1, 256, -257, 0])
    found = np.asarray(fdq.take(q, ids))
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), [False, True, True, False])
    np.testing.assert_array_equal(found[0], whole[-1])
    with jax.debug_nans(True):
        np.testing.assert_array_equal(np.asarray(fdq.take(q, ids[3:])), whole[:1])
    clipped = np.asarray(fdq.take(q, ids, mode="clip"))
    np.testing.assert_array_equal(clipped, whole[[-1, -1, 0, 0]])
    with pytest.raises(ValueError, match=r"expected a weight \[K, N\], found \(3, 256, 512\)"):
        fdq.take(stack, ids)
    with pytest.raises(TypeError, match="ids: expected integers, found float32"):
        fdq.take(q, jnp.ones(2))
    with pytest.raises(ValueError, match="mode='wrap'"):
        fdq.take(q, ids, mode="wrap")


@every_product
def test_the_product_with_the_transpose(name, rng, monkeypatch):
    """In tiles that do not divide the table."""
    monkeypatch.setattr(transposed, "TILE_WEIGHTS", 100 * 512)
    q, x = quantized(name), normal(rng, 2, 3, 512)
    y = transposed.transposed_product(x, q)
    assert error(y, np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64).T) < 5e-6


def test_an_embedding_decodes_the_rows_of_its_tokens(rng):
    """Neither a lookup nor the tied head holds the table in floats."""
    layer = nn.Embedding(8192, 256, rngs=nnx.Rngs(0))
    q = fdq.quantize(nn.value(layer.embedding), "W8A16-channel")
    layer.embedding = nn.boxed(q)
    table, tokens = np.asarray(dequantize(q), np.float64), jnp.array([[5, 8191]])
    split = nn.split(layer)

    @jax.jit
    def both(params, tokens):
        x = nn.bind(split[0], params)(tokens, jnp.float32)
        return x, nn.bind(split[0], params).attend(x)

    x, logits = both(split[1], tokens)
    assert error(x, table[np.asarray(tokens)]) < 1e-6
    assert error(logits, table[np.asarray(tokens)] @ table.T) < 5e-6
    temporary = both.lower(split[1], tokens).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 8192 * 256 * 4 * 0.8
    gradient = jax.grad(lambda x: layer.attend(x).sum())(x)
    assert error(gradient, np.broadcast_to(table.sum(0), x.shape)) < 5e-6


def test_a_quantized_weight_is_no_array_of_numpys():
    kernel = np.arange(32 * 16, dtype=np.float32).reshape(32, 16)
    q = fdq.quantize(jnp.asarray(kernel), "W8A16")
    for convert in (np.asarray, jnp.asarray):
        with pytest.raises(TypeError, match=r"QTensor.* decode it, np\.asarray\(fdq\.dequantize"):
            convert(q)
    stack = jax.tree.map(lambda a: a[None], q)
    with pytest.raises(IndexError, match="index 1 is out of range for an axis of 1"):
        stack[np.int64(1)]
    np.testing.assert_allclose([1.0] * 32 @ q, np.ones(32) @ kernel, rtol=1e-2)


def test_decoding_takes_a_quantized_weight_and_gives_floats():
    q = fdq.quantize(np.ones((32, 16), np.float32), "W8A16")
    for wrong in (np.ones((2, 2)), "weights", None):
        with pytest.raises(TypeError, match=f"expected a QTensor, found a {type(wrong).__name__}"):
            fdq.dequantize(wrong)
    for decode in (fdq.dequantize, lambda q, dtype: q.astype(dtype)):
        for dtype in ("int8", bool, complex):
            with pytest.raises(TypeError, match="expected a dtype of floats, found"):
                decode(q, dtype)
    folded = fdq.quantize({"a": q.astype("float32").T}, [("a", "W8A16", {"contract": 1})])["a"]
    with pytest.raises(TypeError, match=r"found a FoldedWeight: q\.dequantize\(\)"):
        fdq.dequantize(folded)
