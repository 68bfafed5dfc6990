"""`attention(..., sinks=)`, a score of each head beside those of the slots, and `softcap=`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.nn.attention import causal_attention
from tests.closeness import error
from tests.covering import slow_but
from tests.ops.test_attention import KH, SPECS, B, D, H, quantized


def by_hand(q, k, v, sinks, lengths, softcap=None):
    """In float64, with a column for the sink that is left out of the sum."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = max(int(lengths[b]) - q.shape[1] + t + 1, 0)
        keys, values = (a[b, h // (H // KH), :seen] for a in (k, v))
        scores = keys @ q[b, t, h] * D**-0.5
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        scores = np.append(scores, np.float64(sinks[h]))
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum())[:-1] @ values
    return out


def problem(rng, spec):
    (_, k), (_, v) = quantized(rng, spec), quantized(rng, spec)
    q = jnp.asarray(rng.standard_normal((B, 2, H, D)), jnp.float32)
    sinks = jnp.asarray([-3.0, 0.5, 4.0, 90.0], jnp.float32)  # the last takes all there is
    return q, k, v, sinks, jnp.asarray([37, 5, 20], jnp.int32)


@pytest.mark.parametrize("name", slow_but(("int8",), SPECS))
def test_takes_its_share_whatever_the_cache_and_the_program(name, rng):
    """Static zero points too, which a softmax without sinks need not subtract from scores."""
    q, k, v, sinks, lengths = problem(rng, SPECS[name])
    for program, block, softcap in (("decoded", 16, 0.7), ("parts", 16, None), ("lanes", 512, 2.0)):
        wanted = by_hand(q, k.dequantize(), v.dequantize(), sinks, lengths, softcap)
        assert np.abs(wanted).max() > 0.3
        settings = {"lengths": lengths, "sinks": sinks}
        reference = ops.attention_reference(q, k, v, softcap=softcap, **settings)
        assert error(reference, wanted) < 2e-6
        with ops.forced_program(program, block):
            y = jax.jit(functools.partial(fdq.attention, softcap=softcap))(q, k, v, **settings)
        assert error(y, wanted) < 3e-6, program


@pytest.mark.parametrize("name", slow_but(("int4 static",), ("C16", "int8 channel", "int4 static")))
def test_a_softcap_sees_the_scores_themselves(name, rng):
    """Static zero points too, which a plain softmax need not subtract from scores."""
    q, k, v, _, lengths = problem(rng, SPECS[name])
    settings = {"lengths": lengths, "softcap": 0.8}
    nothing = np.full(H, -np.inf)
    wanted = by_hand(q, k.dequantize(), v.dequantize(), nothing, lengths, 0.8)
    y = jax.jit(functools.partial(fdq.attention, softcap=0.8, block_size=16))(
        q, k, v, lengths=lengths
    )
    assert error(y, wanted) < 2e-6
    assert error(ops.attention_reference(q, k, v, **settings), wanted) < 2e-6
    assert error(ops.attention_reference(q, k, v, lengths=lengths), wanted) > 1e-2


def test_in_a_window_and_of_no_slot(rng):
    q, k, v, sinks, lengths = problem(rng, None)
    lengths = lengths.at[1].set(0)
    settings = {"lengths": lengths, "sliding_window": 6, "sinks": sinks, "scale": 0.3}
    y = fdq.attention(q, k, v, block_size=8, **settings)
    assert error(y, ops.attention_reference(q, k, v, **settings)) < 2e-6
    assert not np.asarray(y[1]).any()


def test_attention_over_a_whole_sequence_and_derivatives(rng):
    q, k, v, sinks, _ = problem(rng, None)
    t = 8
    k, v = (a.dequantize()[:, :, :t] for a in (k, v))
    q = jnp.asarray(rng.standard_normal((B, t, H, D)), jnp.float32)
    lengths = jnp.full((B,), t, jnp.int32)

    def whole(q, sinks):
        return causal_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), sinks=sinks)

    def cached(q, sinks):
        return fdq.attention(q, k, v, lengths=lengths, sinks=sinks)

    assert error(whole(q, sinks), by_hand(q, k, v, sinks, lengths)) < 2e-6
    by_arguments = [jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1)) for f in (whole, cached)]
    for one, other in zip(*(jax.jit(f)(q, sinks) for f in by_arguments), strict=True):
        assert error(one, other) < 1e-5


def test_one_a_head_and_no_kernel_of_them(rng):
    q, k, v, sinks, lengths = problem(rng, None)
    with pytest.raises(ValueError, match=r"expected sinks \[4\], one a head, found \(3,\)"):
        fdq.attention(q, k, v, lengths=lengths, sinks=sinks[:3])
    with pytest.raises(ValueError, match=r"softcap=0, expected a positive number"):
        fdq.attention(q, k, v, lengths=lengths, softcap=0)
    kernel = {"lengths": lengths, "implementation": "mosaic_gpu"}
    with pytest.raises(NotImplementedError, match="no kernel has attention sinks"):
        fdq.attention(q[:, :1], k, v, sinks=sinks, **kernel)
    with pytest.raises(NotImplementedError, match="no kernel caps scores"):
        fdq.attention(q[:, :1], k, v, softcap=50.0, **kernel)
