"""The routing kernel against its reference and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import slow

from pallas_kernels.matmul.row_sources import Normed
from pallas_kernels.router.routing import (
    router_logits,
    router_logits_reference,
    supports_router,
    top_k_experts,
    top_k_experts_reference,
)


def random_logits(seed, split, tokens, width):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((split, tokens, width)), jnp.float32)


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "split", "bias", "normalize"),
    [
        (64, 6, 3, 2, True, True),
        slow(128, 8, 2, 1, False, True),
        slow(5, 2, 2, 3, True, False),
        slow(160, 6, 1, 2, True, True),
    ],
)
def test_experts_and_weights_are_those_of_the_reference(
    experts, top_k, tokens, split, bias, normalize
):
    width = -(-experts // 128) * 128
    logits = random_logits(experts, split, tokens, width)
    correction = None
    if bias:
        correction = jnp.asarray(np.random.default_rng(1).standard_normal(experts) * 0.02)
        correction = correction.astype(jnp.float32)
    settings = {"experts": experts, "top_k": top_k, "normalize": normalize, "norm_min": 1e-12}
    index, weights = top_k_experts(logits, correction, **settings)
    wanted_index, wanted_weights = top_k_experts_reference(logits, correction, **settings)
    np.testing.assert_array_equal(index, wanted_index)
    largest = np.abs(wanted_weights).max()
    assert largest > 0
    assert np.abs(weights - wanted_weights).max() <= 5e-6 * largest
    again = top_k_experts(logits, correction, **settings)
    np.testing.assert_array_equal(weights, again[1])


def test_reference_is_the_definition():
    logits = np.asarray(random_logits(3, 2, 2, 128), np.float64)
    bias = np.random.default_rng(4).standard_normal(100) * 0.01
    index, weights = top_k_experts_reference(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        experts=100,
        top_k=4,
        norm_min=1e-12,
    )
    summed = logits.sum(axis=0)[:, :100]
    powers = np.exp(summed - summed.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    for t in range(2):
        chosen = np.argsort(-(probabilities[t] + bias), kind="stable")[:4]
        np.testing.assert_array_equal(index[t], chosen)
        picked = probabilities[t][chosen]
        np.testing.assert_allclose(weights[t], picked / picked.sum(), rtol=1e-5)


def test_equal_scores_take_the_first_expert():
    logits = jnp.zeros((1, 1, 128), jnp.float32)
    index, weights = top_k_experts(logits, None, experts=70, top_k=3)
    np.testing.assert_array_equal(index, [[0, 1, 2]])
    np.testing.assert_allclose(weights, np.full((1, 3), 1 / 3), rtol=1e-6)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="multiple of 128"):
        top_k_experts(jnp.zeros((1, 1, 64), jnp.float32), None, experts=64, top_k=2)
    logits = jnp.zeros((1, 1, 128), jnp.float32)
    with pytest.raises(ValueError, match="top_k=6, expected 1 .. 4"):
        top_k_experts(logits, None, experts=4, top_k=6)
    with pytest.raises(ValueError, match=r"expected correction_bias \[64\], found \(60,\)"):
        top_k_experts(logits, jnp.zeros((60,)), experts=64, top_k=6)
    for k, kernel in ((192, (192, 64)), (256, (256, 96)), (256, (128, 64))):
        with pytest.raises(ValueError, match=rf"needs a kernel \[K={k}, E\]"):
            router_logits(jnp.ones((1, k)), jnp.ones(kernel, jnp.float32))
    with pytest.raises(ValueError, match="expected a float32 kernel, found bfloat16"):
        router_logits(jnp.ones((1, 128)), jnp.ones((128, 64), jnp.bfloat16))


@pytest.mark.slow
def test_gradients_and_vmap_are_those_of_the_references():
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((3, 2, 256)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((256, 64)) / 8, jnp.float32)
    pull = jnp.asarray(rng.standard_normal((2, 6)), jnp.float32)
    options = {"experts": 64, "top_k": 6}

    def weights(x, kernel):
        return top_k_experts(router_logits(x, kernel), None, **options)[1]

    def wanted(x, kernel):
        return top_k_experts_reference(router_logits_reference(x, kernel), None, **options)[1]

    for one, other in zip(
        jax.grad(lambda *a: (weights(*a) * pull).sum(), (0, 1))(x[0], kernel),
        jax.grad(lambda *a: (wanted(*a) * pull).sum(), (0, 1))(x[0], kernel),
        strict=True,
    ):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    each = jax.vmap(weights, (0, None))(x, kernel)
    np.testing.assert_allclose(each, jax.vmap(wanted, (0, None))(x, kernel), rtol=1e-5)


@pytest.mark.parametrize(
    ("experts", "hidden", "rows"), [(64, 640, 2), slow(128, 256, 1), slow(256, 128, 3)]
)
def test_logits_of_plain_and_normalized_rows(experts, hidden, rows):
    rng = np.random.default_rng(experts)
    assert supports_router(experts, hidden)
    kernel = rng.standard_normal((hidden, experts))
    x = jnp.asarray(rng.standard_normal((rows, hidden)), jnp.float32)
    scale = rng.standard_normal(hidden)
    y = np.asarray(router_logits(x, jnp.asarray(kernel, jnp.float32)), np.float64)
    wanted = np.asarray(x, np.float64) @ kernel
    assert np.abs(y.sum(0)[:, :experts] - wanted).max() <= 5e-6 * np.abs(wanted).max()
    normed = Normed(x, jnp.asarray(scale, jnp.float32), 1e-5)
    y = np.asarray(router_logits(normed, jnp.asarray(kernel, jnp.float32)), np.float64)
    square = (np.asarray(x, np.float64) ** 2).mean(axis=1, keepdims=True)
    wanted = (np.asarray(x, np.float64) / np.sqrt(square + 1e-5) * scale) @ kernel
    assert np.abs(y.sum(0)[:, :experts] - wanted).max() <= 5e-6 * np.abs(wanted).max()
    reference = router_logits_reference(normed, jnp.asarray(kernel, jnp.float32))[0]
    assert np.abs(reference - wanted).max() <= 5e-6 * np.abs(wanted).max()


def test_rounding_of_normalized_rows_is_that_of_the_model():
    """bfloat16 rows are rounded after the norm, as fdq.nn.RMSNorm does."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 256)), jnp.bfloat16)
    normed = Normed(x, jnp.ones((256,), jnp.bfloat16), 1e-6)
    kernel = jnp.asarray(rng.standard_normal((256, 64)), jnp.float32)
    y = np.asarray(router_logits(normed, kernel), np.float64).sum(0)[:, :64]
    wanted = np.asarray(normed.value(), np.float64) @ np.asarray(kernel, np.float64)
    assert np.abs(y - wanted).max() <= 5e-6 * np.abs(wanted).max()
