"""WINT2 with feedback: code for code what float64 NumPy finds from the definition of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.formats.convolutional import CC2, CODE_OFFSET, CODE_SCALE
from fdq.quantizers import ccq, quantize_array, second_moment
from fdq.schemes.scheme import WeightSpec
from tests.covering import longest

SPEC = WeightSpec.default("cc2")
K, N = 128, 24


def moment(rng, size):
    mixing = np.eye(size) + rng.standard_normal((size, size)) / np.sqrt(size)
    x = rng.standard_normal((4 * size, size)) @ mixing * np.exp(0.5 * rng.standard_normal(size))
    return (x.T @ x / len(x)).astype(np.float32)


def words():
    """What the 256 codes stand for, as FastDeploy's kernel decodes them."""
    code = np.arange(256, dtype=np.float32)
    word = np.floor(code * CODE_SCALE + CODE_OFFSET + np.float32(0.5)).astype(int)
    return np.stack([(word >> shift & 63) - 32 for shift in (9, 6, 3, 0)], axis=-1)


def fed(w, scale, h, order):
    """Codes of fours of rows in turn: each the word whose loss is least, all rows after it free."""
    fixed, error = [], np.zeros_like(w)
    rows = np.arange(len(w)).reshape(-1, 4)
    codes = np.zeros((len(rows), w.shape[1]), int)
    for b in order:
        mine, rest = rows[b], np.setdiff1d(np.arange(len(w)), [*fixed, *rows[b]])
        free = np.concatenate([mine, rest])
        # What all free rows would best lose to make up for the errors so far.
        best = -np.linalg.solve(h[np.ix_(free, free)], h[np.ix_(free, fixed)] @ error[fixed])[:4]
        cost = h[np.ix_(mine, mine)]
        if len(rest):
            across = h[np.ix_(mine, rest)]
            cost = cost - across @ np.linalg.solve(h[np.ix_(rest, rest)], across.T)
        losses = error_of(words(), w[mine] - best, scale[b], cost)
        codes[b] = losses.argmin(axis=0)
        error[mine] = w[mine] - words()[codes[b]].T * scale[b]
        fixed.extend(mine)
    return codes


def error_of(book, target, scale, cost):
    """`[256, n]`: the loss of each word in the place of a target `[4, n]`."""
    d = target[None] - book[:, :, None] * scale
    return np.einsum("cin,ij,cjn->cn", d, cost, d)


def descended(w, codes, scale, h, order):
    """Each four set to its best word beside all others."""
    codes, rows = codes.copy(), np.arange(len(w)).reshape(-1, 4)
    value = np.concatenate([words()[c].T * s for c, s in zip(codes, scale, strict=True)])
    for b in order:
        mine = rows[b]
        left = w - value
        left[mine] = 0
        target = w[mine] + np.linalg.solve(h[np.ix_(mine, mine)], h[mine] @ left)
        codes[b] = error_of(words(), target, scale[b], h[np.ix_(mine, mine)]).argmin(axis=0)
        value[mine] = words()[codes[b]].T * scale[b]
    return codes


def test_code_for_code(rng):
    w = rng.standard_normal((K, N)).astype(np.float32)
    h = np.asarray(second_moment.damped(jnp.asarray(moment(rng, K))))
    local = rng.integers(5, 15, (K // 64, N)).astype(np.float32)
    super_scale = np.full((1, N), 0.0625, np.float32) / 10

    @jax.jit
    def run(w, h, local, super_scale):
        rows = ccq._Rows.of(h)
        pair = (jnp.full((1, 1), CODE_SCALE), jnp.full((1, 1), CODE_OFFSET))
        codes = jnp.zeros((K // 4, N), jnp.int32)
        columns = ccq._Columns(codes, local, super_scale, ccq._words(*pair))
        one = rows._fed(w, columns)
        left = w - one.scaled() * one.scale
        two = rows._swept(w, one, rows.descent, left)
        return one.codes, two.codes, two.scaled() * two.scale

    one, two, decoded = map(np.asarray, run(w, h, local, super_scale))
    scale = (local * super_scale).astype(np.float64).repeat(16, axis=0)
    h, w = h.astype(np.float64), w.astype(np.float64)
    order = np.argsort(-np.diag(h).reshape(-1, 4).mean(axis=1), kind="stable")
    np.testing.assert_array_equal(one, fed(w, scale, h, order))
    np.testing.assert_array_equal(two, descended(w, one, scale, h, order))
    arrays = {
        "codes": two.astype(np.uint8),
        "scale": local[0:1].astype(np.uint8) | local[1:2].astype(np.uint8) << 4,
        "code_scale": np.full((1, N), CODE_SCALE),
        "code_offset": np.full((1, N), CODE_OFFSET),
        "super_scale": super_scale,
    }
    np.testing.assert_array_equal(decoded, CC2.decode(jax.tree.map(jnp.asarray, arrays), SPEC))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ccq", longest("ccq2")])
def test_a_fraction_of_the_loss_of_a_search(method, rng):
    """Also of each matrix of a stack, by its own moments; pairs differ from column to column."""
    w = rng.standard_normal((2, K, N)).astype(np.float32)
    w[0, 64:, 3], w[1, :, 5] = 0, 0
    h, g = (np.stack([moment(rng, size) for _ in range(2)]) for size in (K, N))
    statistics = {"input_moment": h, "output_moment": g}
    q = quantize_array(w, SPEC, method=method, statistics=statistics)
    plain = quantize_array(w, SPEC, method="search")
    two = method == "ccq2"

    def loss(q, i):
        d = np.asarray(fdq.dequantize(q), np.float64)[i] - w[i]
        return np.einsum("ij,ik,kl,lj->", d, h[i], d, g[i] if two else np.eye(N), optimize=True)

    for i in range(2):
        assert loss(q, i) < (0.4 if two else 0.5) * loss(plain, i)
    assert len(np.unique(np.asarray(q.code_scale))) > 3
    decoded = np.asarray(fdq.dequantize(q))
    assert not decoded[0, 64:, 3].any() and not decoded[1, :, 5].any()
    stored = np.asarray(q.super_scale)
    np.testing.assert_array_equal(stored, stored.astype(jnp.bfloat16).astype(np.float32))


def test_words_are_far_enough_apart_for_a_fused_multiplication():
    """FastDeploy's kernel fuses where NumPy rounds twice; a pair must mean the same to both."""
    for scale, offset, _ in ccq.PAIRS[1:].astype(np.float32).astype(np.float64):
        word = np.arange(256) * scale + offset + 0.5
        assert word.max() < 2**15 and word.min() >= 0
        assert np.abs(word - np.round(word)).min() > 2**-9  # what float32 resolves there


def test_what_is_missing_or_of_another_format(rng):
    w = np.ones((64, 16), np.float32)
    with pytest.raises(ValueError, match=r"a\.b: .*'ccq' needs the input_moment.*moments=True"):
        quantize_array(w, SPEC, method="ccq", path="a.b")
    with pytest.raises(ValueError, match="'ccq2' needs the output_moment"):
        quantize_array(w, SPEC, method="ccq2", statistics={"input_moment": np.eye(64)})
    with pytest.raises(ValueError, match="no method 'ccq', which is for WINT2"):
        quantize_array(w, WeightSpec.default("int8"), method="ccq")
    q = quantize_array(w, SPEC, method="ccq", statistics={"input_moment": np.zeros((64, 64))})
    assert np.isfinite(np.asarray(fdq.dequantize(q))).all()
