"""Caches in blocks of 32 tokens against a float64 definition that stores token by token."""

import functools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fdq
from fdq.cache import BlockTensor, KVCache, LayerCache
from fdq.ops.rope_append.xla import write_slots
from tests.covering import longest, slow

KH, G, D, SLOTS = 2, 2, 8, 75
CONFIG = types.SimpleNamespace(num_layers=1, num_kv_heads=KH, head_dim=D, dtype="float32")
BOUNDS = {"C8-kvblock": None, "C4-kvblock": 15, "C3-kvblock": 7, "C2-kvblock": 3}


def rounded(x, axes, bound):
    """What codes of float64 numbers that share scales over `axes` stand for."""
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    if bound is None:
        scale = np.maximum(np.maximum(-low, high), 1e-10) / 127
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
        return np.clip(np.round(x / scale), -127, 127) * scale
    middle = (low + high) / 2
    scale = np.maximum((high - low) / bound, np.maximum(abs(middle) / 1000, 1e-10))
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float64)
    zero = (bound / 2 - middle / scale).astype(np.float16).astype(np.float64)
    # Codes are whole: the grid is `scale` wide and begins at `-zero * scale`.
    codes = np.clip(np.round(x / scale + zero), 0, bound)
    return (codes - zero) * scale


class Half:
    """Keys or values `[KH, ., D]` of one sequence: full blocks as codes, the newest as it is."""

    def __init__(self, axes, bound):
        self.round = functools.partial(rounded, axes=axes, bound=bound)
        self.full, self.number, self.block = {}, 0, np.zeros((KH, 0, D))

    def write(self, x, slot):
        number, at = divmod(slot, 32)
        if number != self.number:
            self.block = self.full.get(number, np.zeros((KH, 0, D)))
            self.number = number
        self.block = np.concatenate([self.block[:, :at], x[:, None]], axis=1)
        if self.block.shape[1] == 32:
            self.full[number] = self.round(self.block)

    def seen(self):
        before = [self.full[i] for i in range(self.number)]
        return np.concatenate([*before, self.block], axis=1)


class Sequence:
    def __init__(self, bound):
        self.k, self.v, self.length = Half(1, bound), Half(2, bound), 0

    def token(self, q, k, v, window=None):
        """Attention `[H, D]` of one more token."""
        self.k.write(k, self.length)
        self.v.write(v, self.length)
        self.length += 1
        keys, values = self.k.seen(), self.v.seen()
        first = 0 if window is None else max(0, self.length - window)
        scores = np.einsum("hgd,hsd->hgs", q.reshape(KH, G, D), keys[:, first:]) / np.sqrt(D)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hgs,hsd->hgd", weights, values[:, first:]).reshape(KH * G, D)


@functools.partial(jax.jit, static_argnames="window", donate_argnums=0)
def step(cache, q, k, v, start, ends, *, window=None):
    pair = cache.ending(ends).layers[0]
    pair = LayerCache(*(write_slots(s, x, start) for s, x in zip(pair, (k, v), strict=True)))
    lengths = start + q.shape[1]
    y = fdq.attention(q, *pair, lengths=lengths, offset=start, sliding_window=window, block_size=32)
    return y, KVCache((pair.settled(),), cache.length).ending(None)


stored = jax.jit(BlockTensor.of, static_argnums=1, static_argnames="keys")
decoded = jax.jit(BlockTensor.dequantize)


def tokens(rng, *shape):
    """Queries, keys whose channels have means of their own, and values."""
    q, k, v = (rng.standard_normal((*shape, heads, D)) for heads in (KH * G, KH, KH))
    return [x.astype(np.float32) for x in (q, k + 4 * np.arange(D), v)]


def feed(cache, sequences, new, counts=None, **options):
    """Both ways; `counts` of each sequence are tokens, what follows them is padding."""
    t = new[0].shape[1]
    start = np.array([s.length for s in sequences], np.int32)
    ends = None if counts is None else jnp.asarray(start + np.asarray(counts, np.int32))
    y, cache = step(cache, *new, jnp.asarray(start), ends, **options)
    for row, sequence in enumerate(sequences):
        count = t if counts is None else counts[row]
        for i in range(count):
            wanted = sequence.token(*(x[row, i].astype(np.float64) for x in new), **options)
            np.testing.assert_allclose(y[row, i], wanted, rtol=2e-5, atol=2e-5)
    return cache


@pytest.mark.parametrize("name", [longest("C2-kvblock"), slow("C3-kvblock"), longest("C8-kvblock")])
def test_every_token_attends_as_if_it_were_stored_alone(name, rng):
    """Ragged, in chunks that end on blocks' borders and not, with tokens taken back."""
    cache = KVCache.init(CONFIG, 2, SLOTS, name)
    sequences = [Sequence(BOUNDS[name]) for _ in range(2)]
    assert isinstance(cache.layers[0].k, BlockTensor)
    cache = feed(cache, sequences, tokens(rng, 2, 41), counts=[41, 31])
    for _ in range(2):  # the second sequence fills a block, and begins one
        cache = feed(cache, sequences, tokens(rng, 2, 1))
    cache = feed(cache, sequences, tokens(rng, 2, 30))
    assert [s.length for s in sequences] == [73, 63]
    cache = feed(cache, sequences, tokens(rng, 2, 1))
    # Of the first the newest block is left, of the second only what codes say of an earlier one.
    for sequence, length in zip(sequences, (66, 20), strict=True):
        sequence.length = length
    cache = feed(cache, sequences, tokens(rng, 2, 1))
    sequences[0].length = 40
    cache = feed(cache, sequences, tokens(rng, 2, 30))
    feed(cache, sequences, tokens(rng, 2, 1))


@pytest.mark.slow
def test_windows_and_rows_of_other_caches(rng):
    sequences = [Sequence(3) for _ in range(2)]
    cache = KVCache.init(CONFIG, 2, SLOTS, "C2-kvblock")
    cache = feed(cache, sequences, tokens(rng, 2, 41), counts=[35, 30], window=20)
    cache = feed(cache, sequences, tokens(rng, 2, 1), window=20)
    # Into a longer cache, and in another order.
    longer = KVCache.init(CONFIG, 2, 130, "C2-kvblock").insert([1, 0], cache)
    again = longer.take([1])
    for _ in range(2):
        again = feed(again, sequences[:1], tokens(rng, 1, 1))


def test_blocks_of_one_cache_shorter_than_a_block(rng):
    sequences, cache = [Sequence(15)], KVCache.init(CONFIG, 1, 20, "C4-kvblock")
    cache = feed(cache, sequences, tokens(rng, 1, 13))
    feed(cache, sequences, tokens(rng, 1, 1))


@pytest.mark.slow
def test_sinks_caps_and_what_it_decodes_to(rng):
    """Against the reference, which decodes the whole cache: for the newest token that is exact."""
    x = [jnp.asarray(a.swapaxes(1, 2)) for a in tokens(rng, 2, 70)]
    spec = fdq.CacheSpec.parse("C4-kvblock")
    k, v = stored(x[1], spec), stored(x[2], spec, keys=False)
    lengths = jnp.full((2,), 70)
    options = {"lengths": lengths, "sinks": jnp.arange(4.0), "softcap": 3.0, "scale": 0.2}
    q = x[0][:, :, -1:].swapaxes(1, 2)
    wanted = fdq.ops.attention.xla.attention_reference(q, k, v, **options)
    np.testing.assert_allclose(fdq.attention(q, k, v, **options), wanted, rtol=2e-5, atol=2e-5)
    exact = np.asarray(decoded(k) - x[1])
    assert not exact[:, :, 64:].any() and exact[:, :, :64].any()
    assert abs(exact).max() < 8 / 15  # half a step of a range of 8 or so
    with pytest.raises(ValueError, match="write their keys and values first"):
        fdq.attention(x[0].swapaxes(1, 2), k, v, lengths=lengths)


def test_values_share_scales_by_64_channels(rng):
    x = rng.standard_normal((1, 2, 64, 128)).astype(np.float32)
    tensor = stored(jnp.asarray(x), fdq.CacheSpec.parse("C4-kvblock"), keys=False)
    assert tensor.scale.shape == (1, 2, 64, 2)
    wanted = rounded(x.astype(np.float64).reshape(1, 2, 64, 2, 64), (4,), 15).reshape(x.shape)
    found = np.asarray(decoded(tensor))[:, :, :32]
    np.testing.assert_allclose(found, wanted[:, :, :32], rtol=1e-5, atol=1e-5)


def test_what_is_constant_stays_finite():
    x = jnp.full((1, 1, 40, 8), 1000.0)
    for keys in (True, False):
        tensor = stored(x, fdq.CacheSpec.parse("C2-kvblock"), keys=keys)
        np.testing.assert_allclose(decoded(tensor), 1000.0, rtol=2e-3)


def test_bytes_and_refusals():
    cache = KVCache.init(CONFIG, 1, 1024, "C4-kvblock")
    # Codes, scales and zero points; the open block and two numbers of each half.
    keys, values = 1024 * D // 2 + 32 * D * 4, 1024 * D // 2 + 1024 * 4
    assert cache.nbytes == KH * (keys + values) + 2 * KH * 32 * D * 4 + 2 * 8
    with pytest.raises(ValueError, match="'none' with|heads are turned only"):
        fdq.CacheSpec.parse("C4-kvblock-kvrotated")
    with pytest.raises(ValueError, match="divisible by 8, got 12"):
        KVCache.init(types.SimpleNamespace(**vars(CONFIG) | {"head_dim": 12}), 1, 64, "C3-kvblock")
    with pytest.raises(ValueError, match="computes its scales"):
        KVCache.init(CONFIG, 1, 64, "C4-kvblock", scales=[fdq.cache.LayerScales(k=1, v=1)])
    k = cache.layers[0].k
    q, lengths = jnp.zeros((1, 1, KH * G, D)), jnp.ones((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="no kernel reads a C4-kvblock cache"):
        fdq.attention(q, k, k, lengths=lengths, implementation="mosaic_gpu")
