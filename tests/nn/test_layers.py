"""Linear, experts, embedding, norm and attention: with arrays and with QTensors inside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import nn
from fdq.cache import CacheTensor, LayerCache
from fdq.nn.attention import QUERY_BLOCK, causal_attention
from fdq.schemes.scheme import ActivationSpec
from tests.covering import slow


def rngs():
    return nnx.Rngs(params=0)


def quantized(module, scheme):
    """The same module with its kernel boxed, and the kernel's decoded value."""
    q = fdq.quantize(nn.value(module.kernel), scheme)
    module.kernel = nn.boxed(q)
    return fdq.dequantize(q)


@pytest.mark.parametrize("use_bias", [False, True])
def test_linear(use_bias, rng):
    layer = nn.Linear(32, 8, use_bias=use_bias, rngs=rngs())
    bias = np.zeros(8, np.float32)
    if use_bias:
        bias = rng.standard_normal(8).astype(np.float32)
        layer.bias.set_value(jnp.asarray(bias))
    x = rng.standard_normal((2, 3, 32)).astype(np.float32)
    w = np.asarray(nn.value(layer.kernel))
    np.testing.assert_allclose(layer(x), x @ w + bias, atol=1e-5)
    w = np.asarray(quantized(layer, "W4A16-g16"))
    np.testing.assert_allclose(layer(x), x @ w + bias, atol=1e-5)
    half = layer(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert layer(jnp.asarray(x, jnp.bfloat16), out_dtype=jnp.float32).dtype == jnp.float32


def test_linear_with_quantized_activations(rng):
    layer = nn.Linear(32, 8, rngs=rngs())
    w = np.asarray(quantized(layer, "W8A16"))
    x = rng.standard_normal((3, 32)).astype(np.float32)
    layer.activation = ActivationSpec(format="int8", granularity="tensor", dynamic=False)
    scale = np.abs(x).max() / 127
    layer.activation_scale = nn.ActivationScale(jnp.float32(scale))
    rounded = np.clip(np.rint(x / scale), -127, 127) * scale
    np.testing.assert_allclose(layer(x), rounded @ w, atol=1e-4)


def test_quantized_variables_are_no_params():
    """An optimizer over `nnx.Param` sees floats only, and gradients flow past the codes."""
    layer = nn.Linear(32, 8, use_bias=True, rngs=rngs())
    quantized(layer, "W4A16-g32")
    assert list(nnx.state(layer, nnx.Param)) == ["bias"]
    kinds = {type(v) for v in jax.tree.leaves(layer, is_leaf=lambda v: isinstance(v, nnx.Variable))}
    assert kinds == {nn.QCodes, nn.QScale, nnx.Param}
    gradient = nnx.grad(lambda layer, x: layer(x).sum())(layer, jnp.ones((2, 32)))
    np.testing.assert_allclose(gradient["bias"].get_value(), 2.0)


@pytest.mark.parametrize(
    ("tokens", "scheme"), [(2, "W4A16-g16"), slow(9, None), slow(2, None), slow(9, "W4A16-g16")]
)
def test_experts(scheme, tokens, rng):
    layer = nn.Experts(4, 32, 16, rngs=rngs())
    gate_up, down = (np.asarray(nn.value(p.kernel)) for p in (layer.gate_up_proj, layer.down_proj))
    if scheme:
        gate_up = np.asarray(quantized(layer.gate_up_proj, scheme))
        down = np.asarray(quantized(layer.down_proj, scheme))
    x = rng.standard_normal((tokens, 32)).astype(np.float32)
    experts = rng.integers(0, 4, (tokens, 2)).astype(np.int32)
    weights = rng.random((tokens, 2)).astype(np.float32)
    expected = np.zeros((tokens, 32))
    for t in range(tokens):
        for e, weight in zip(experts[t], weights[t], strict=True):
            gate, up = np.split(x[t] @ gate_up[e], 2)
            expected[t] += weight * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(layer(x, experts, weights), expected, atol=2e-5)


def test_embedding(rng):
    layer = nn.Embedding(24, 32, rngs=rngs())
    table = np.asarray(nn.value(layer.embedding))
    tokens = np.array([[3, 0], [23, 7]], np.int32)
    np.testing.assert_array_equal(layer(tokens, jnp.float32), table[tokens])
    x = rng.standard_normal((2, 32)).astype(np.float32)
    np.testing.assert_allclose(layer.attend(x), x @ table.T, atol=1e-5)
    assert layer(tokens, jnp.bfloat16).dtype == jnp.bfloat16
    half = nn.Embedding(24, 32, dtype=jnp.bfloat16, rngs=rngs())
    assert half.attend(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
    q = fdq.quantize(jnp.asarray(table), "W8A16")
    layer.embedding = nn.boxed(q)
    decoded = np.asarray(fdq.dequantize(q))
    np.testing.assert_allclose(layer(tokens, jnp.float32), decoded[tokens], atol=1e-7)
    np.testing.assert_allclose(layer.attend(x), x @ decoded.T, atol=1e-5)


def test_norm_is_computed_in_float32(rng):
    norm = nn.RMSNorm(16, epsilon=1e-3, dtype=jnp.bfloat16)
    scale = rng.standard_normal(16).astype(jnp.bfloat16)
    norm.scale.set_value(jnp.asarray(scale))
    x = (rng.standard_normal((3, 16)) * 300).astype(jnp.bfloat16)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * scale.astype(np.float64)
    y = norm(jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-3)


def reference_attention(q, k, v, window=None):
    k, v = (np.repeat(a, q.shape[2] // k.shape[2], axis=2).astype(np.float64) for a in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    visible = np.tril(np.ones(scores.shape[-2:], bool))
    if window is not None:
        visible &= ~np.tril(visible, -window)
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [1, 7, QUERY_BLOCK + 5])
def test_causal_attention(length, rng):
    """The last length takes the path that goes through queries block by block."""
    q = rng.standard_normal((1, length, 2, 4)).astype(np.float32) * 2
    k, v = rng.standard_normal((2, 1, length, 1, 4)).astype(np.float32)
    y = jax.jit(causal_attention)(q, k, v)
    np.testing.assert_allclose(y, reference_attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize("length", [7, QUERY_BLOCK + 5])
def test_causal_attention_in_a_window(length, rng):
    q = rng.standard_normal((1, length, 2, 4)).astype(np.float32) * 2
    k, v = rng.standard_normal((2, 1, length, 1, 4)).astype(np.float32)
    y = jax.jit(functools.partial(causal_attention, sliding_window=3))(q, k, v)
    np.testing.assert_allclose(y, reference_attention(q, k, v, window=3), atol=1e-5)


@pytest.mark.slow
def test_a_window_reaches_the_cache(rng):
    """At once, in chunks and a token at a time; and without the window it is another result."""
    layer = nn.Attention(32, 4, 2, 8, sliding_window=3, rngs=rngs())
    x = jnp.asarray(rng.standard_normal((2, 9, 32)), jnp.float32)
    angles = nn.rotary_angles(jnp.arange(9)[None].repeat(2, 0), nn.RotaryConfig(), 8)
    expected, _ = layer(x, angles)
    cache = LayerCache(*(CacheTensor.empty((2, 2, 9, 8), dtype=jnp.float32) for _ in "kv"))
    for first, last in ((0, 5), (5, 8), (8, 9)):
        turn = tuple(a[:, first:last] for a in angles)
        y, cache = layer(x[:, first:last], turn, cache, start=jnp.int32(first))
        np.testing.assert_allclose(y, expected[:, first:last], atol=1e-5)
    layer.sliding_window = None
    assert np.abs(layer(x, angles)[0] - expected).max() > 0.01


def test_split_and_bind(rng):
    """A bound module computes what the module does; params may be of another layout."""
    layer = nn.MLP(32, 16, rngs=rngs())
    quantized(layer.down_proj, "W8A16")
    template, params = nn.split(layer)
    assert isinstance(params["down_proj"]["kernel"], fdq.QTensor)
    assert isinstance(params["down_proj"]["kernel"].codes, jax.Array)
    x = jnp.asarray(rng.standard_normal((2, 32)), jnp.float32)
    run = jax.jit(lambda params, x: nn.bind(template, params)(x))
    np.testing.assert_allclose(run(params, x), layer(x), atol=1e-5)
    np.testing.assert_allclose(run(fdq.prepare(params), x), layer(x), atol=1e-5)
    assert nn.split(nnx.clone(layer))[0] == template
    assert hash(nn.split(nnx.clone(layer))[0]) == hash(template)
    assert nn.split(nn.MLP(32, 16, use_bias=True, rngs=rngs()))[0] != template
    del params["gate_up_proj"]
    with pytest.raises(ValueError, match=r"params lack gate_up_proj\.kernel"):
        nn.bind(template, params)
