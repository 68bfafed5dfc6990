"""Experts for many rows: decoded once, multiplied in rounds. Kernels run in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq import ops
from fdq.ops import self_check
from fdq.ops.choice import Target
from fdq.ops.grouped_matmul import decoded
from fdq.ops.grouped_matmul.product import GroupedProduct
from tests.closeness import error
from tests.covering import longest

EXPERTS, K, N = 5, 64, 72


def stack(rng, scheme="W4A16-g64"):
    values = jnp.asarray(rng.standard_normal((EXPERTS, K, N)) * 0.05, jnp.float32)
    return ops.prepare(fdq.quantize(values, scheme), "gpu")


def test_rounds_leave_no_row_out(rng):
    """Half of all picks are one expert's, one expert has none, and one is of another device."""
    values = rng.standard_normal((EXPERTS, K, N))
    x = jnp.asarray(rng.standard_normal((100, K)), jnp.float32)
    index = np.concatenate([np.full(100, 3), rng.choice([0, 1, 4, EXPERTS], 100)])
    rng.shuffle(index)
    order = np.argsort(index, kind="stable")
    counts = np.bincount(index, minlength=EXPERTS + 1)[:EXPERTS]
    firsts = np.cumsum(counts) - counts
    known = np.minimum(index, EXPERTS - 1)
    place = np.argsort(order) - firsts[known]
    size, y = decoded.share(100, EXPERTS), jnp.full((200, N), 7.0)
    assert size == 48 and counts.max() > 2 * size
    for own in (slice(0, 3), slice(3, 5)):
        args = (counts[own], firsts[own], order, index - own.start, place)
        args = [jnp.asarray(a, jnp.int32) for a in args]
        weights = jnp.asarray(values[own], jnp.float32)
        y = decoded._rounds(x, weights, None, *args, size, 2, y)
    mine = index < EXPERTS
    wanted = np.einsum("pk,pkn->pn", np.repeat(np.asarray(x, np.float64), 2, 0), values[known])
    assert error(y[mine], wanted[mine]) < 1e-6
    assert (y[~mine] == 7).all()


@pytest.mark.parametrize(
    ("scheme", "activation", "most"),
    [
        ("W4A16-g64", None, 2**30),
        longest("W4A16-g64", None, 128 * 64 * 4),
        longest("W8A16", "int8", 2**30),
        longest("Wfp8A16", "fp8-x128", 2**30),
    ],
)
def test_it_is_the_product(scheme, activation, most, rng, monkeypatch):
    monkeypatch.setattr(decoded, "_MOST_DECODED", most)
    w = stack(rng, scheme)
    x = jnp.asarray(rng.standard_normal((20, K)), jnp.float32)
    index = jnp.asarray(rng.choice([0, 1, 3, 4], (20, 2)), jnp.int32)
    y = fdq.grouped_matmul(x, w, index, activation=activation, implementation="decoded")
    assert y.shape == (20, 2, N)
    if activation is None:
        picked = np.asarray(fdq.dequantize(w), np.float64)[np.asarray(index)]
        wanted = np.einsum("tk,tpkn->tpn", np.asarray(x, np.float64), picked)
    else:
        wanted = fdq.grouped_matmul(x, w, index, activation=activation, implementation="xla")
    assert error(y, wanted) < 2e-6


def test_rows_of_other_devices_are_zeros(rng):
    """Those of the index E, also where the last expert has no rows and so is not decoded."""
    w, x = stack(rng), jnp.asarray(rng.standard_normal((20, K)), jnp.float32)
    index = np.asarray(rng.choice([0, 1, 3, EXPERTS], (20, 2)))
    arguments = GroupedProduct(x, w, index=jnp.asarray(index, jnp.int32), shard=True)
    y = np.asarray(decoded.Decoded()(arguments)[0])
    assert (y[index == EXPERTS] == 0).all() and (y[index < EXPERTS] != 0).all()


@pytest.mark.slow
@pytest.mark.longest
def test_outliers_fit_where_there_is_no_bfloat16(rng, monkeypatch):
    """Values past 65504, of activations with scales per token and group, in float16."""
    monkeypatch.setattr(decoded, "trace_target", lambda: Target("gpu", False))
    monkeypatch.setattr(decoded, "traced_for", object)
    w, x = stack(rng), jnp.asarray(rng.standard_normal((20, K)) * 1e6, jnp.bfloat16)
    index = jnp.asarray(rng.choice([0, 1, 3, 4], (20, 2)), jnp.int32)
    y = fdq.grouped_matmul(x, w, index, activation="fp8-x128", implementation="decoded")
    wanted = fdq.grouped_matmul(x, w, index, activation="fp8-x128", implementation="xla")
    assert error(y, np.asarray(wanted, np.float64)) < 0.01


def test_when_it_is_chosen(rng, monkeypatch):
    monkeypatch.setattr(self_check, "is_real", lambda device: False)
    one, w = decoded.Decoded(), stack(rng)

    def product(tokens, w=w, **settings):
        index = jnp.zeros((tokens, 2), jnp.int32)
        return GroupedProduct(jnp.ones((tokens, K)), w, index=index, **settings)

    assert one.declined(product(100)) is None
    assert "rows are few" in str(one.declined(product(3)))
    assert "fdq.prepare" in str(one.declined(product(100, ops.unprepare(w))))
    assert "nothing to decode" in str(one.unsupported(product(100, jnp.ones((EXPERTS, K, N)))))
    scales = product(100, activation_scale=jnp.ones((EXPERTS,)))
    assert "one scale for all experts" in str(one.unsupported(scales))


def test_what_is_decoded_at_a_time_is_bounded():
    assert decoded._cuts(64, 2560 * 3072 * 2) == [(0, 64)]
    large = decoded._cuts(64, 8192 * 7168 * 2)
    assert sum(count for _, count in large) == 64 and len(large) == 8
    assert decoded._cuts(3, 2**31) == [(0, 1), (1, 1), (2, 1)]
    assert jax.eval_shape(lambda: jnp.zeros(decoded.share(12288, 64))).shape == (384,)
