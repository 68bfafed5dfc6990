"""Rotation and the write to the cache: the kernel's launch means what XLA's steps do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from covering import slow

from fdq.cache import CacheTensor, parse_format, quantize_cache
from fdq.cache.cache_tensor import sample_scales
from fdq.ops import self_check
from fdq.ops.rope_append.api import rope_append
from fdq.ops.rope_append.mosaic_gpu import Appending
from fdq.ops.rope_append.xla import RopeAppendArguments, rotated_heads
from fdq.ops.rows import Sums

HEADS, KV_HEADS, SLOTS, D = 3, 2, 20, 64
WIDTH = (HEADS + 2 * KV_HEADS) * D


def make(rng, name, *, tokens=1, batch=2):
    """Sums of qkv in two parts with a bias, angles, keys, values, and norms."""
    spec = parse_format(name)
    parts = jnp.asarray(rng.standard_normal((2, batch, tokens, WIDTH)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(WIDTH), jnp.bfloat16)
    angle = jnp.asarray(rng.uniform(0, 6, (batch, tokens, D // 2)), jnp.float32)
    shape = (batch, KV_HEADS, SLOTS, D)
    side = CacheTensor.empty(shape, spec, **sample_scales(spec, KV_HEADS, D))
    norms = {"q_norm": jnp.full((D,), 1.5), "k_norm": jnp.full((D,), 0.5)}
    qkv = Sums(parts, bias, jnp.bfloat16)
    return (qkv, (jnp.cos(angle), jnp.sin(angle)), side, side), norms


@pytest.mark.parametrize("name", [slow("C16"), "C4", slow("C8-kvhead")])
def test_one_token_in_one_launch(rng, name):
    arguments, norms = make(rng, name)
    start = jnp.asarray([5, SLOTS - 1], jnp.int32)

    def run(implementation):
        options = {"interleaved": False, "implementation": implementation, **norms}
        return jax.jit(lambda *a: rope_append(*a, start, **options))(*arguments)

    (q, *pair), (wanted_q, *wanted) = run("mosaic_gpu"), run("xla")
    assert q.shape == (2, 1, HEADS, D) and q.dtype == jnp.bfloat16
    assert_close(q.astype(jnp.float32), wanted_q.astype(jnp.float32), of_largest=0.01)
    for found, expected in zip(pair, wanted, strict=True):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert np.asarray(found.codes).any()
        assert_close(found.dequantize(), expected.dequantize(), of_largest=0.08)


def test_several_tokens_are_written_where_they_belong(rng):
    (qkv, angles, k, v), norms = make(rng, "C8", tokens=3)
    start = jnp.asarray([0, 11], jnp.int32)
    q, k, v = rope_append(qkv, angles, k, v, start, interleaved=True, **norms)
    wanted = rotated_heads(qkv, angles, KV_HEADS, interleaved=True, **norms)
    np.testing.assert_array_equal(q, wanted[0])
    for found, x in zip((k, v), wanted[1:], strict=True):
        expected = quantize_cache(x.swapaxes(1, 2), found.spec)
        for row, first in enumerate(start):
            where = (row, slice(None), slice(first, first + 3))
            np.testing.assert_array_equal(found.codes[where], expected.codes[row])
            np.testing.assert_array_equal(found.scale[where], expected.scale[row])
            assert np.count_nonzero(found.scale[row]) == 3 * KV_HEADS


def test_what_is_refused(rng):
    (qkv, angles, k, v), norms = make(rng, "C8", tokens=2)
    start = jnp.int32(0)
    forced = {"interleaved": True, "implementation": "mosaic_gpu"}
    with pytest.raises(NotImplementedError, match=r"rope_append\[mosaic_gpu\]: .*one token"):
        rope_append(qkv, angles, k, v, start, **forced)
    with pytest.raises(ValueError, match="q_norm and k_norm go together"):
        rope_append(qkv, angles, k, v, start, interleaved=True, q_norm=norms["q_norm"])
    with pytest.raises(ValueError, match=r"expected \[2, T, \(heads \+ 4\) 64\]"):
        rope_append(jnp.zeros((2, 1, 100)), angles, k, v, start, interleaved=True)
    other = CacheTensor.empty(k.shape, parse_format("C4"))
    one = (Sums.of(jnp.zeros((2, 1, WIDTH))), tuple(a[:, :1] for a in angles))
    with pytest.raises(NotImplementedError, match="keys and values of one format"):
        rope_append(*one, k, other, start, **forced)


@pytest.mark.slow
def test_the_self_checks_case_passes_in_the_interpreter(rng, monkeypatch):
    monkeypatch.setattr(self_check, "is_real", lambda device: True)
    monkeypatch.setattr(self_check, "_RESULTS", {})
    (qkv, angles, k, v), norms = make(rng, "C4")
    arguments = RopeAppendArguments(qkv, angles, k, v, jnp.int32(0), False, **norms)
    assert Appending.of(arguments).self_check().failure(jax.devices()[0]) is None
    assert self_check._RESULTS
