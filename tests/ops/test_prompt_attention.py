"""Attention of prompts as GPUs compute it: by JAX's library call, and by dots of 16-bit floats."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.cache import parse_format, quantize_cache
from fdq.cache.cache_tensor import CacheTensor, sample_scales
from fdq.ops.attention import cudnn, xla
from fdq.ops.attention.xla import AttentionArguments, attention_reference
from fdq.ops.choice import Target
from tests.closeness import error
from tests.covering import slow


def arguments(rng, format="C8", t=7, slots=80, window=None, dtype=jnp.float32):
    spec = parse_format(format)
    sides = [jnp.asarray(rng.standard_normal((2, 2, slots, 16)), jnp.float32) for _ in range(2)]
    scales = sample_scales(spec, 2, 16)
    k, v = (quantize_cache(side, spec, **scales) for side in sides)
    q = jnp.asarray(rng.standard_normal((2, t, 4, 16)), dtype)
    offset = jnp.asarray([slots - t - 3, 5], jnp.int32)
    return AttentionArguments(q, k, v, offset + jnp.asarray([t, t - 2]), offset, window, 0.3)


def reference(a):
    settings = {"lengths": a.lengths, "offset": a.offset, "sliding_window": a.sliding_window}
    return np.asarray(attention_reference(a.q, a.k, a.v, scale=a.scale, **settings), np.float64)


@pytest.mark.parametrize(
    ("format", "window"), [("C8", 9), slow("C8", None), slow("C4", 70), slow("C16", 9)]
)
def test_the_library_call_is_attention(format, window, rng):
    a = arguments(rng, format, window=window)
    assert cudnn._span(a) == (80 if window != 9 else 64)
    assert error(cudnn.attend(a, "xla"), reference(a)) < 2e-6


def test_queries_that_see_nothing_get_zeros(rng):
    a = arguments(rng)
    a = AttentionArguments(a.q, a.k, a.v, jnp.asarray([0, 9]), a.offset, None, 0.3)
    y = cudnn.attend(a, "xla")
    assert not y[0].any() and np.isfinite(y).all() and y[1].any()


def test_derivatives_are_those_of_xla(rng):
    """Forward and reverse; cuDNN's call itself would have none of either for some masks."""
    a = arguments(rng, "C16")

    def run(program, q):
        return (program(dataclasses.replace(a, q=q)) ** 2).sum()

    def found(program):
        f = functools.partial(run, program)
        _, tangent = jax.jvp(f, (a.q,), (jnp.ones_like(a.q),))
        return tangent, jax.jit(jax.grad(f))(a.q)

    ours = found(lambda a: cudnn.attend(a, "xla"))
    for mine, wanted in zip(ours, found(xla.Xla()), strict=True):
        assert error(mine, np.asarray(wanted, np.float64)) < 1e-5


def test_what_cudnn_does_not_take(rng):
    a = arguments(rng, dtype=jnp.bfloat16)
    assert cudnn.unsupported(a, 9.0) is None
    assert "16-bit" in str(cudnn.unsupported(a, 7.5))
    assert "16-bit" in str(cudnn.unsupported(arguments(rng), 9.0))
    capped = AttentionArguments(a.q, a.k, a.v, a.lengths, a.offset, None, 0.3, softcap=30.0)
    assert "caps" in str(cudnn.unsupported(capped, 9.0))
    wide = CacheTensor(jnp.zeros((1, 1, 8, 192), jnp.bfloat16))
    q = jnp.zeros((1, 2, 1, 192), jnp.bfloat16)
    wide = AttentionArguments(q, wide, wide, a.lengths[:1], a.offset[:1], None, 0.3)
    assert "heads of" in str(cudnn.unsupported(wide, 8.0))
    assert cudnn.unsupported(wide, 9.0) is None
    with pytest.raises(NotImplementedError, match="there is no cuDNN for this device here"):
        fdq.attention(a.q, a.k, a.v, lengths=a.lengths, implementation="cudnn")


@pytest.mark.slow
def test_the_self_checks_case(rng):
    for result, wanted in zip(*cudnn.prompt_case(2, 16, jnp.float32, "xla"), strict=True):
        assert error(result, np.asarray(wanted, np.float64)) < 2e-6


@pytest.fixture
def traced_for_a_gpu(monkeypatch):
    """Programs that a GPU would get, run by the CPU."""
    monkeypatch.setattr(xla, "trace_target", lambda: Target("gpu", True))
    monkeypatch.setattr(xla, "traced_for", object)


@pytest.mark.parametrize("format", ["C4", *map(slow, ("C8", "Cfp8", "C16"))])
def test_dots_are_of_16_bits(format, rng, traced_for_a_gpu):
    a = arguments(rng, format, window=40, dtype=jnp.bfloat16)
    run = jax.jit(lambda *arrays: xla.Xla()(AttentionArguments(*arrays, 40, 0.3)))
    arrays = (a.q, a.k, a.v, a.lengths, a.offset)
    dots = [line for line in run.lower(*arrays).as_text().splitlines() if "dot_general" in line]
    assert dots and all("xbf16>, tensor<" in line and "xf32>, tensor<" not in line for line in dots)
    assert error(run(*arrays), reference(a)) < 0.02


def test_blocks_of_slots_bound_the_scores(rng, traced_for_a_gpu):
    a = arguments(rng)
    assert a.program().size == 2**24 // 64
    long = jax.eval_shape(lambda: jnp.zeros((1, 2048, 32, 16)))
    assert AttentionArguments(long, a.k, a.v, a.lengths, a.offset, None, 1.0).program().size == 256
