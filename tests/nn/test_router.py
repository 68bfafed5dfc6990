"""Routing against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdq.nn import Router
from fdq.ops.route.xla import choose_experts


def definition(logits, bias, top_k, normalize, norm_min):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    chosen = np.argsort(-(p if bias is None else p + bias), axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(p, chosen, -1)
    if normalize:
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), norm_min)
    return chosen, weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("normalize", "norm_min"), [(False, 0.0), (True, 0.0), (True, 0.9)])
def test_route(bias, normalize, norm_min, rng):
    logits = rng.standard_normal((20, 8)).astype(np.float32)
    offset = (rng.standard_normal(8) * 0.3).astype(np.float32) if bias else None
    experts, weights = choose_experts(
        jnp.asarray(logits),
        None if offset is None else jnp.asarray(offset),
        top_k=3,
        normalize=normalize,
        norm_min=norm_min,
    )
    chosen, expected = definition(logits.astype(np.float64), offset, 3, normalize, norm_min)
    np.testing.assert_array_equal(experts, chosen)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_the_correction_bias_selects_and_does_not_weigh():
    logits = jnp.zeros((1, 4)).at[0, 0].set(1.0)
    bias = jnp.array([0.0, 0.0, 0.0, 10.0])
    experts, weights = choose_experts(logits, bias, top_k=2)
    assert experts.tolist() == [[3, 0]]
    p = jax.nn.softmax(logits[0])
    np.testing.assert_allclose(weights[0], [p[3] / (p[3] + p[0]), p[0] / (p[3] + p[0])], rtol=1e-6)


def test_router_is_float32_whatever_comes_in():
    router = Router(8, 4, top_k=2, correction_bias=True, rngs=nnx.Rngs(params=0))
    experts, weights = router(jnp.ones((3, 8), jnp.bfloat16))
    assert experts.shape == (3, 2) and weights.dtype == jnp.float32
    assert router.kernel.dtype == router.correction_bias.dtype == jnp.float32
