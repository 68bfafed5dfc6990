"""Calibration: what is observed is what the layers were fed."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq.models
from fdq.cache.kv_cache import KVCache
from fdq.calibration.observation import calibrate
from fdq.nn import RotaryConfig
from fdq.schemes.scheme import ActivationSpec, CacheSpec

CONFIG = fdq.models.DecoderConfig(
    model_type="ernie4_5_moe",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_epsilon=1e-5,
    rotary=RotaryConfig(),
    dtype="float32",
    moe=fdq.models.MoEConfig(num_experts=4, top_k=2, intermediate_size=16, layers=(1,)),
)


@pytest.fixture(scope="module")
def decoder():
    return fdq.models.Decoder(CONFIG, rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 64, (3, 10))


@pytest.fixture(scope="module")
def calibration(decoder, tokens):
    return calibrate(decoder, tokens, batch_size=2)


def test_decoder_is_observed_and_left_alone(decoder, tokens, calibration):
    assert calibration.tokens == 30
    assert sorted(calibration.absmax) == sorted(calibration.mean_square)
    paths = {path.removeprefix("layers.") for path in calibration.absmax}
    assert {"0.self_attn.qkv_proj.kernel", "0.mlp.down_proj.kernel"} <= paths
    assert {"1.mlp.experts.gate_up_proj.kernel", "1.mlp.experts.down_proj.kernel"} <= paths
    hidden = decoder.embed_tokens(jnp.asarray(tokens), jnp.float32)
    fed = np.asarray(decoder.layers[0].input_layernorm(hidden)).reshape(30, -1)
    path = "layers.0.self_attn.qkv_proj.kernel"
    np.testing.assert_allclose(calibration.absmax[path], np.abs(fed).max(0), rtol=1e-5)
    np.testing.assert_allclose(calibration.importance[path], (fed**2).mean(0), rtol=1e-5)
    assert decoder.layers[0].self_attn.kv_observer is None
    assert type(decoder.layers[0].mlp.down_proj).__name__ == "Linear"
    spec = ActivationSpec(format="int8", granularity="tensor", dynamic=False)
    scale = calibration.activation_scale(path, spec)
    assert scale.shape == () and np.isclose(scale, np.abs(fed).max() / 127)
    with pytest.raises(ValueError, match=r"lm_head\.missing: no calibration"):
        calibration.activation_scale("lm_head.missing", spec)


@pytest.mark.slow
def test_cache_ranges_are_those_of_the_cache(decoder, tokens, calibration):
    cache = KVCache.init(CONFIG, 3, 10)
    _, cache = decoder.extend(jnp.asarray(tokens), cache, jnp.int32(0))
    for layer, seen in enumerate(calibration.cache):
        for name in ("k", "v"):
            stored = np.asarray(getattr(cache.layers[layer], name).codes)
            largest = getattr(seen, f"{name}_max")
            np.testing.assert_allclose(largest, stored.max((0, 2)), rtol=1e-4, atol=1e-5)
            smallest = getattr(seen, f"{name}_min")
            np.testing.assert_allclose(smallest, stored.min((0, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "width"),
    [
        (CacheSpec(format="int8", granularity="channel", dynamic=False), 8),
        (CacheSpec(format="float8_e4m3", granularity="head", dynamic=False), 1),
        (CacheSpec(format="int4", granularity="channel", dynamic=False, zero_point=True), 8),
    ],
    ids=lambda x: getattr(x, "format", x),
)
def test_static_cache_scales(calibration, spec, width):
    scales = calibration.cache_scales(spec)
    assert len(scales) == 2 and scales[0].k.shape == (2, width)
    cache = KVCache.init(CONFIG, 1, 16, spec, scales=scales)
    stored = cache.layers[0].k
    assert stored.scale.shape == (2, width)
    assert (stored.zero is None) == (not spec.zero_point)
    seen = calibration.cache[0]
    if spec.zero_point:
        codes = seen.k_max / scales[0].k + scales[0].k_zero
        assert codes.max() < 15.6
    with pytest.raises(ValueError, match="needs scales"):
        KVCache.init(CONFIG, 1, 16, spec)


def test_dynamic_formats_need_no_calibration(calibration):
    with pytest.raises(ValueError, match="needs no calibrated scales"):
        calibration.cache_scales("C8")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x)) + x


class Anyones(nnx.Module):
    """A scan-stacked layer, a shared one, attention, a list and a convolution."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(rngs)

        self.blocks = stacked(rngs)
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.tied = nnx.Linear(6, 6, rngs=rngs)
        self.same = self.tied
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.conv = nnx.Conv(6, 6, (3,), rngs=rngs)
        self.heads = nnx.List([nnx.Linear(6, 2, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])

    def __call__(self, x):
        x = self.first(x)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        x = run(self.blocks, x)
        x = self.same(self.tied(x))
        x = self.conv(self.attention(x))
        return self.heads[0](x), self.heads[1](x)


def test_anyones_module(rng):
    model = Anyones(nnx.Rngs(params=0, dropout=1))
    x = rng.standard_normal((2, 7, 5)).astype(np.float32)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    seen = calibrate(model, [x, 2 * x])
    assert np.allclose(seen.absmax["first.kernel"], 2 * np.abs(x).max((0, 1)))
    assert np.allclose(seen.importance["first.kernel"], 2.5 * (x**2).mean((0, 1)), rtol=1e-5)
    assert seen.absmax["blocks.linear.kernel"].shape == (3, 6)
    assert (seen.absmax["blocks.linear.kernel"] > 0).all()
    assert {"heads.0.kernel", "heads.1.kernel", "attention.query.kernel"} <= set(seen.absmax)
    assert seen.absmax["attention.out.kernel"].shape == (6,)
    assert ("tied.kernel" in seen.absmax) != ("same.kernel" in seen.absmax)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_no_tokens(decoder):
    with pytest.raises(ValueError, match="got none"):
        calibrate(decoder, np.zeros((0, 4), np.int32))


def test_the_sample_has_the_hash_of_its_tokens(rng):
    class Layer(nnx.Module):
        def __init__(self):
            self.proj = fdq.nn.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, tokens):
            return self.proj(jax.nn.one_hot(tokens, 8))

    tokens = rng.integers(8, size=(4, 6)).astype(np.int32)
    expected = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    padded = np.pad(tokens, ((0, 0), (0, 2)))
    lengths = np.full(4, 6, np.int32)
    found = [calibrate(Layer(), tokens, batch_size=2).sample]
    found.append(calibrate(Layer(), padded, lengths=lengths).sample)
    assert found == [expected] * 2
