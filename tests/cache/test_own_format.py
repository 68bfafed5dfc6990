"""A cache format from outside works end to end, and layers of a cache may differ."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.cache import CACHE_FORMATS, CacheFormat, KVCache
from fdq.formats.exact_arithmetic import quotient
from fdq.nn import RotaryConfig

CONFIG = fdq.models.config.DecoderConfig(
    model_type="toy",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_epsilon=1e-6,
    rotary=RotaryConfig(),
    dtype="float32",
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


class Int6(CacheFormat):
    """6-bit integers, each in a byte of its own."""

    name = "int6"
    grammar_name = "6"
    code_dtype = jnp.int8
    bound = 31.0

    def encode(self, x, scale, zero):
        codes = jnp.clip(jnp.round(quotient(x, scale)), -self.bound, self.bound)
        return codes.astype(jnp.int8)

    def decode_planes(self, codes):
        return [codes.astype(jnp.float32)]


@pytest.fixture
def int6():
    with CACHE_FORMATS.registered(Int6()):
        yield


@pytest.fixture(scope="module")
def model():
    return fdq.models.Decoder(CONFIG, rngs=nnx.Rngs(params=0))


def test_a_format_of_ones_own_generates(int6, model):
    assert str(fdq.Scheme.parse("w4a16c6")) == "W4A16C6"
    assert fdq.CacheSpec.parse("C6-kvchannel").granularity == "channel"
    with pytest.raises(ValueError, match="no zero points"):
        fdq.CacheSpec(format="int6", zero_point=True)
    out = fdq.generate(model, PROMPTS, max_new_tokens=6, cache="C6")
    assert [len(tokens) for tokens in out] == [6, 6]


@pytest.mark.slow
def test_it_is_calibrated_and_planned(int6, model):
    spec = fdq.CacheSpec.parse("C6-kvhead")
    tokens = np.arange(10).reshape(1, 10)
    scales = fdq.calibrate(model, tokens).cache_scales(spec)
    cache = KVCache.init(CONFIG, 1, 16, spec, scales=scales)
    text = jnp.asarray(tokens)
    hidden, cache = model.extend(text, cache, jnp.int32(0))
    exact, floats = model.extend(text, KVCache.init(CONFIG, 1, 16), jnp.int32(0))
    assert np.abs(hidden - exact).max() < 0.2 * np.abs(exact).max()
    stored, wanted = (c.layers[0].k.dequantize() for c in (cache, floats))
    assert np.abs(stored - wanted).max() <= 0.51 / 31 * np.abs(wanted).max()
    assert fdq.plan(CONFIG, "W16A16C6", context=16).cache_bytes == 2 * 2 * 16 * 2 * (8 + 4)


def test_no_kernel_reads_it(int6):
    spec = fdq.CacheSpec.parse("C6")
    side = fdq.cache.CacheTensor.empty((1, 2, 16, 64), spec)
    q, lengths = jnp.zeros((1, 1, 4, 64)), jnp.ones((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="no kernel reads a int6 cache"):
        fdq.attention(q, side, side, lengths=lengths, implementation="mosaic_gpu")
    assert not fdq.attention(q, side, side, lengths=lengths).any()


@pytest.mark.slow
def test_layers_may_differ(model):
    tokens = jnp.asarray([PROMPTS[0]])
    cache = KVCache.init(CONFIG, 1, 16, ["C8", None])
    assert [layer.k.spec is None for layer in cache.layers] == [False, True]
    hidden, cache = model.extend(tokens, cache, jnp.int32(0))
    exact, _ = model.extend(tokens, KVCache.init(CONFIG, 1, 16), jnp.int32(0))
    assert 0 < np.abs(hidden - exact).max() < 0.05 * np.abs(exact).max()
    assert [layer.v.spec for layer in model.init_cache(1, 16, ["C8", None]).layers][1] is None
    with pytest.raises(ValueError, match="cache formats of 1 layers, expected 2"):
        KVCache.init(CONFIG, 1, 16, ["C8"])
    config = types.SimpleNamespace(num_layers=1, num_kv_heads=1, head_dim=7, dtype="float32")
    with pytest.raises(ValueError, match="int4 KV cache needs an even head_dim, got 7"):
        KVCache.init(config, 1, 16, "C4")
