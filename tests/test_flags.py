"""What JAX's flags change, and that nothing of ours changes with them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from tests.covering import slow
from tests.models import oracles

FLAGS = {
    "x64": lambda: jax.enable_x64(True),
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "highest": lambda: jax.default_matmul_precision("highest"),
    "bfloat16": lambda: jax.default_matmul_precision("bfloat16"),
}
NAMES = ["W8A16", "W4A16", "W4A16-asym-g32", "W3A16", "W2A16", "WNF4A16", "WNVFP4", "WMXFP4"]


def weight():
    return np.random.default_rng(0).standard_normal((128, 16)).astype(np.float32)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    "name", [*(n if n in ("W4A16", "WNVFP4") else slow(n) for n in NAMES), "WCC2", "Wfp8"]
)
def test_quantizing_and_multiplying(name, flag):
    w = weight()
    x = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
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


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag not in ("disable_jit",)])
@pytest.mark.parametrize("cache", ["C8", slow("C16"), slow("C4")])
def test_generating(cache, flag):
    model, _ = oracles.oracle("ernie4_5_moe")
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    settings = {"max_new_tokens": 4, "stop_tokens": (), "cache": cache}
    warm = fdq.Sampling(temperature=0.8, top_k=5)
    with contextlib.ExitStack() as stack:
        expected = fdq.generate(model, prompts, **settings)
        drawn = fdq.generate(model, prompts, **settings, sampling=warm)
        stack.enter_context(FLAGS[flag]())
        assert fdq.generate(model, prompts, **settings) == expected
        assert fdq.generate(model, prompts, **settings, sampling=warm) == drawn
