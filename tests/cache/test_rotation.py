"""Heads turned by a Hadamard matrix, and packed codes of few bits, against float64 definitions."""

import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fdq
from fdq.cache import CacheTensor, KVCache, LayerScales, quantize_cache
from fdq.cache.rotation import hadamard, rotated
from tests.covering import slow

KH, G, D, SLOTS = 2, 2, 24, 21  # turned eight channels at a time
BOUNDS = {"2": 3, "3": 7, "4": 15}


def matrix(d):
    """Kronecker products, as large as a power of two that divides d lets them be; and zeros."""
    h = np.ones((1, 1))
    while d % (2 * len(h)) == 0:
        h = np.kron(h, [[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    return np.kron(np.eye(d // len(h)), h)


@pytest.mark.parametrize("d", [1, 2, 24, 64, 80])
def test_turning_is_a_product_that_undoes_itself(d, rng):
    x = rng.standard_normal((3, d))
    turned = np.asarray(rotated(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(turned, x @ matrix(d), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rotated(jnp.asarray(turned)), x, rtol=1e-5, atol=1e-5)


def test_the_matrix_is_orthogonal():
    h = hadamard(64).astype(np.float64)
    np.testing.assert_allclose(h @ h, np.eye(64), atol=1e-6)


def stored(x, bound, mean=0.0):
    """What codes of turned heads stand for, float64 `[..., D]`, turned still."""
    x = (x - mean) @ matrix(D)
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / bound
    zero = np.round(-low / scale)
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
    return (np.clip(np.round(x / scale) + zero, 0, bound) - zero) * scale


@pytest.mark.parametrize(
    ("bits", "kind"), [("4", "centered"), slow("3", "centered"), slow("2", "rotated")]
)
def test_attention_over_turned_heads(bits, kind, rng):
    """With a sink and a cap, which do not leave out what all scores have in common."""
    q, k, v = (rng.standard_normal((2, SLOTS, n, D)) for n in (KH * G, KH, KH))
    k = k + 3 * rng.standard_normal((KH, D))
    mean = k.mean((0, 1)) if kind == "centered" else np.zeros((KH, D))
    sinks, cap = rng.standard_normal(KH * G), 4.0
    keys, values = stored(k, BOUNDS[bits], mean), stored(v, BOUNDS[bits])
    keys = keys @ matrix(D) + mean
    group = q.reshape(2, SLOTS, KH, G, D)[:, -3:]
    scores = np.einsum("bthgd,bshd->bhgts", group, keys) / np.sqrt(D)
    scores = cap * np.tanh(scores / cap)
    visible = np.arange(SLOTS) <= np.arange(SLOTS - 3, SLOTS)[:, None]
    weights = np.where(visible, np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True) + np.exp(sinks).reshape(1, KH, G, 1, 1)
    out = np.einsum("bhgts,bshd->bthgd", weights / total, values)
    wanted = (out @ matrix(D)).reshape(2, 3, KH * G, D)

    spec = fdq.CacheSpec.parse(f"C{bits}-kv{kind}")
    config = types.SimpleNamespace(num_layers=1, num_kv_heads=KH, head_dim=D, dtype="float32")
    scales = [LayerScales(k=None, v=None, k_mean=mean)] if kind == "centered" else None
    empty = KVCache.init(config, 2, SLOTS, spec, scales=scales).layers[0]
    pair = (
        jax.tree.map(lambda new, old: new.astype(old.dtype), t.encode(jnp.float32(x)), t)
        for t, x in zip(empty, (k.swapaxes(1, 2), v.swapaxes(1, 2)), strict=True)
    )
    found = fdq.attention(
        jnp.float32(q[:, -3:]),
        *pair,
        lengths=jnp.full((2,), SLOTS),
        sinks=jnp.float32(sinks),
        softcap=cap,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BOUNDS)
def test_codes_are_packed_from_the_lowest_bits_on(bits, rng):
    format = fdq.cache.CACHE_FORMATS[f"int{bits}"]
    codes = rng.integers(0, BOUNDS[bits] + 1, (3, 5, 64), dtype=np.uint8)
    packed = np.asarray(format.pack(jnp.asarray(codes)))
    assert packed.shape == (3, 5, 64 * int(bits) // 8)
    flat = (codes[..., None] >> np.arange(int(bits))) & 1  # bit by bit, lowest first
    wanted = np.packbits(flat.reshape(3, 5, -1), axis=-1, bitorder="little")
    if bits == "3":  # three bytes of eight channels: first bytes first
        wanted = wanted.reshape(3, 5, 8, 3).swapaxes(-1, -2).reshape(3, 5, -1)
    np.testing.assert_array_equal(packed, wanted)
    planes = format.integer_planes(jnp.asarray(packed))
    np.testing.assert_array_equal(np.stack(planes, -1).reshape(codes.shape), codes)


def test_bytes_and_refusals(rng):
    config = types.SimpleNamespace(num_layers=1, num_kv_heads=KH, head_dim=64, dtype="float32")
    # 4 bits, and a bfloat16 and a byte a token and head: 4.375 bits a number.
    assert KVCache.init(config, 1, 128, "C4-kvrotated").nbytes == 2 * 128 * KH * (32 + 3)
    with pytest.raises(ValueError, match="means of keys needs scales"):
        KVCache.init(config, 1, 128, "C4-kvcentered")
    with pytest.raises(ValueError, match="k_mean: got shape None"):
        scales = [LayerScales(k=jnp.ones((KH, 1)), v=jnp.ones((KH, 1)))]
        KVCache.init(config, 1, 128, "C4-kvcentered", scales=scales)
    with pytest.raises(ValueError, match="heads are turned only"):
        fdq.CacheSpec.parse("C4-kvchannel-kvrotated")
    with pytest.raises(ValueError, match="both decide the transform"):
        fdq.CacheSpec.parse("C4-kvrotated-kvcentered")
    side = quantize_cache(jnp.ones((1, KH, 4, 64)), fdq.CacheSpec.parse("C4-kvrotated"))
    assert isinstance(side, CacheTensor) and side.kernel is None
    q, lengths = jnp.zeros((1, 1, KH * G, 64)), jnp.ones((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="no kernel reads a C4-kvrotated cache"):
        fdq.attention(q, side, side, lengths=lengths, implementation="mosaic_gpu")


@pytest.mark.slow
def test_calibrated_means_are_those_of_keys(rng):
    from flax import nnx

    from fdq.nn import RotaryConfig

    config = fdq.models.config.DecoderConfig(
        model_type="toy",
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_epsilon=1e-6,
        rotary=RotaryConfig(),
        dtype="float32",
    )
    model = fdq.models.Decoder(config, rngs=nnx.Rngs(params=0))
    tokens = rng.integers(0, 31, (3, 9))
    seen = fdq.calibrate(model, tokens, lengths=np.array([9, 4, 1]), batch_size=2)
    scales = seen.cache_scales("C4-kvcentered")
    _, cache = model.extend(jnp.asarray(tokens), KVCache.init(config, 3, 9), jnp.int32(0))
    for one, layer in zip(scales, cache.layers, strict=True):
        keys = np.concatenate([layer.k.codes[b, :, :n] for b, n in enumerate((9, 4, 1))], axis=1)
        np.testing.assert_allclose(one.k_mean, keys.mean(1), rtol=1e-4, atol=1e-4)
        assert one.k is one.v is None
