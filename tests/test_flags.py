"""What JAX's flags change, and that nothing of ours changes with them."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.decoding.repetition import repetition_penalty
from tests.covering import longest, slow, slow_but
from tests.models import oracles

FLAGS = {
    "x64": lambda: jax.enable_x64(True),
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "highest": lambda: jax.default_matmul_precision("highest"),
    "bfloat16": lambda: jax.default_matmul_precision("bfloat16"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
}
GUARD = {"transfer_guard": lambda: jax.transfer_guard("disallow")}
NAMES = ["W8A16", "W4A16", "W4A16-asym-g32", "W3A16", "W2A16", "WNF4A16", "WNVFP4", "WMXFP4"]


def weight(k=128, n=16):
    return np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)


# Every format under what changes dtypes or how it is traced; two of them under every flag.
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        *(("W4A16", flag) for flag in FLAGS),
        *(slow("WNVFP4", flag) for flag in FLAGS),
        *(
            longest(name, flag)
            for name in (*NAMES, "WCC2", "Wfp8")
            if name not in ("W4A16", "WNVFP4")
            for flag in ("x64", "disable_jit", "debug_infs")
            if (name, flag) != ("WCC2", "disable_jit")  # a minute, for its search is a long loop
        ),
    ],
)
def test_quantizing_and_multiplying(name, flag):
    w = weight(64, 2) if name == "WCC2" else weight()  # its search is a loop over K
    x = np.random.default_rng(1).standard_normal((2, w.shape[0])).astype(np.float32)
    expected = fdq.quantize(w, name)
    product = np.asarray(fdq.matmul(jnp.asarray(x), expected))
    with FLAGS[flag]():
        q = fdq.quantize(w, name)
        y = fdq.matmul(jnp.asarray(x), q)
        assert y.dtype == jnp.float32
    for found, like in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
        assert found.dtype == like.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(like))
    np.testing.assert_allclose(np.asarray(y), product, rtol=0, atol=2e-6 * np.abs(product).max())


@pytest.mark.parametrize("flag", slow_but(("x64",), FLAGS))
def test_transformations(flag):
    """jvp, jacfwd, grad, vmap, checkpoint and a scan over layers, by one product's definition."""
    rng = np.random.default_rng(0)
    layers = fdq.quantize(rng.standard_normal((2, 32, 32)).astype(np.float32) / 6, "W4A16-g32")
    x, dx = (jnp.asarray(rng.standard_normal((2, 32)), jnp.float32) for _ in range(2))
    w = np.asarray(fdq.dequantize(layers), np.float64)

    def network(x, layers):
        step = jax.checkpoint(lambda x, q: (jnp.sin(fdq.matmul(x, q)), None))
        return jax.lax.scan(step, x, layers)[0]

    def by_hand(x):
        first = np.sin(np.asarray(x, np.float64) @ w[0])
        return first, np.sin(first @ w[1]), np.cos(np.asarray(x, np.float64) @ w[0])

    first, y, inner = by_hand(x)
    outer = np.cos(first @ w[1])
    change = ((np.asarray(dx, np.float64) @ w[0] * inner) @ w[1]) * outer
    gradient = ((outer @ w[1].T) * inner) @ w[0].T
    with FLAGS[flag]():
        found, tangent = jax.jvp(lambda x: network(x, layers), (x,), (dx,))
        checks = [
            (found, y),
            (tangent, change),
            (jax.grad(lambda x: network(x, layers).sum())(x), gradient),
            (jax.vmap(network, in_axes=(0, None))(x, layers), y),
            (jax.vmap(fdq.matmul, in_axes=(None, 0))(x, layers), np.asarray(x, np.float64) @ w),
            (jax.jacfwd(lambda x: fdq.matmul(x, layers[0]))(x[0]), w[0].T),
            (
                jax.grad(lambda s: fdq.matmul(x, layers[0].replace(scale=s)).sum())(
                    layers[0].scale
                ),
                np.asarray(x, np.float64).sum(0) @ (w[0] / np.asarray(layers[0].scale, np.float64)),
            ),
        ]
    for a, b in checks:
        a, b = np.asarray(a, np.float64), np.asarray(b).reshape(a.shape)
        limit = 5e-3 if a.dtype == jnp.bfloat16 or a.shape == layers[0].scale.shape else 1e-5
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * np.abs(b).max())


@pytest.mark.parametrize(
    ("cache", "flag"),
    [
        *(slow("C8", flag) for flag in ("x64", "debug_nans", "bfloat16")),
        *(longest("C8", flag) for flag in ("debug_infs", "highest")),
    ],
)
def test_generating(cache, flag):
    model, _ = oracles.oracle("ernie4_5_moe")
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    settings = {"max_new_tokens": 4, "stop_tokens": (), "cache": cache}
    warm = fdq.Sampling(temperature=0.8, top_k=5)
    with contextlib.ExitStack() as stack:
        drawn = fdq.generate(model, prompts, **settings, sampling=warm)
        stack.enter_context(FLAGS[flag]())
        assert fdq.generate(model, prompts, **settings, sampling=warm) == drawn


@pytest.fixture(scope="module")
def small():
    """A quantized layer, its compiled step, and what that gives; compiled with the guard up."""
    config = dataclasses.replace(oracles.oracle("qwen3")[0].config, num_layers=1)
    model = fdq.quantize(fdq.models.Decoder(config, rngs=nnx.Rngs(0)), "W4A16C8-g32")
    fns = fdq.functional(model)

    @jax.jit
    def step(params, state):
        logits, state = fns.step(params, state)
        return logits, state.push(logits.argmax(-1), logits=logits)

    def begin():
        return fdq.prefill(model, np.int32([[1, 2, 3]]), fdq.KVCache.init(config, 1, 8, "C8"))

    state = begin()
    with jax.transfer_guard("disallow"):
        logits, _ = step(fns.params, state)
    return model, begin, lambda state: step(fns.params, state), np.asarray(logits)


@pytest.mark.parametrize(
    "flag",
    [
        "transfer_guard",
        *map(slow, ("debug_nans", "x64", "disable_jit")),
        *map(longest, ("debug_infs", "highest")),
    ],
)
def test_a_decode_step(small, flag):
    _, begin, step, expected = small
    state = begin()
    with (FLAGS | GUARD)[flag]():
        for _ in range(2):
            logits, state = step(state)
            jax.block_until_ready(logits)
            assert logits.dtype == jnp.float32
            if expected is not None:
                np.testing.assert_allclose(jax.device_get(logits), expected, rtol=0, atol=1e-5)
            expected = None  # of the first step only
    assert state.length.tolist() == [5] and state.tokens.dtype == jnp.int32


def test_decoding_moves_nothing_unasked(small):
    model, begin, *_ = small
    expected = fdq.decode(model, begin(), 3).generated()
    warm = fdq.Sampling(temperature=0.8, top_k=5)
    fdq.decode(model, begin(), 1, sampling=warm)
    states = begin(), begin()
    with jax.transfer_guard("disallow"):
        found = fdq.decode(model, states[0], 3)
        fdq.decode(model, states[1], 1, sampling=warm, stop_tokens=[1])
        assert found.generated() == expected


@pytest.mark.slow
def test_what_a_loop_of_ones_own_does(small):
    """`extend`, `push`, `rollback` and a penalty, with integers of 64 bits."""
    model, *_ = small
    fns, tokens, found = fdq.functional(model), np.array([[1, 2, 3]]), []
    penalty = repetition_penalty(1.5)

    def loop(params, state):
        _, state = fns.extend(params, tokens[:, :2], state)
        logits, state = fns.step(params, state.rollback(4))
        return state.push(penalty(logits, state).argmax(-1), logits=logits)

    for flag in (contextlib.nullcontext, FLAGS["x64"]):
        with flag():
            cache = fdq.KVCache.init(model.config, 1, 8, "C8")
            state = fdq.prefill(model, tokens, cache, return_logprobs=True)
            state = jax.jit(loop)(fns.params, state)
            found.append([np.asarray(a) for a in (state.tokens, state.length, state.logprobs)])
    for plain, wide in zip(*found, strict=True):
        assert plain.dtype == wide.dtype
        np.testing.assert_allclose(wide, plain, atol=1e-5)
