"""Decoded weights in the interpreter against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from canonical_weights import CASES, Case, generator, random_weight
from closeness import error
from covering import longest, slow

from pallas_kernels.matmul.decode import decode_weight, decode_weight_reference

INT4 = Case("int4", "group", 64, zero_point="integer", scale_dtype=np.float16)
# One of every format, wherever its decoding differs from the default's.
SLOW = {
    next(i for i, c in enumerate(CASES) if c.format == name) for name in {c.format for c in CASES}
}


def over_columns(w, values):
    """Without what multiplies whole columns."""
    return (
        values if w.column_scale is None else values / np.asarray(w.column_scale)[..., : w.layout.n]
    )


@pytest.mark.parametrize(
    ("case", "k", "n"),
    [
        (INT4, 64, 72),
        slow(INT4, 192, 200),
        *(longest(CASES[i], 256, 136, id=CASES[i].format) for i in sorted(SLOW)),
    ],
    ids=str,
)
def test_every_format(case, k, n):
    w, values = random_weight(case, k, n)
    found = decode_weight(w, jnp.float32)
    assert found.shape == (-(-k // w.layout.segment) * w.layout.segment, w.layout.padded_n)
    assert np.isfinite(found).all()
    assert error(found[:k, :n], over_columns(w, values)) < 1e-6
    rounded = decode_weight(w, jnp.bfloat16, after=jnp.ones((3,)))[:k, :n]
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, decode_weight_reference(w, jnp.bfloat16))


@pytest.mark.slow
def test_experts_without_rows_are_left_out():
    w, values = random_weight(INT4, 64, 72, (4,))
    counts = jnp.asarray([5, 0, 1, 2], jnp.int32)
    factor = jnp.asarray(generator("factor").uniform(0.5, 2, (4, 1, 128)), jnp.float32)
    found = decode_weight(w, jnp.float32, counts=counts, factor=factor, experts=(1, 3))
    wanted = values * np.asarray(factor)[..., :72]
    for i, expert in enumerate((1, 2, 3)):
        if counts[expert]:
            assert error(found[i, :, :72], wanted[expert]) < 1e-6


@pytest.mark.slow
def test_vmap():
    w, values = random_weight(INT4, 64, 72, (2,))
    found = jax.vmap(lambda w: decode_weight(w, jnp.float32))(w)
    assert error(found[:, :, :72], values) < 1e-6
    one = jax.tree.map(lambda a: a[0], w)
    alone = jax.vmap(lambda x: decode_weight(one, jnp.float32, after=x))(jnp.ones((3, 4)))
    np.testing.assert_array_equal(alone, np.stack([found[0]] * 3))


def test_what_does_not_fit_is_refused():
    w, _ = random_weight(INT4, 64, 72, (2,))
    one = jax.tree.map(lambda a: a[0], w)
    for arguments, message in (
        ((one, jnp.int8), "dtype int8"),
        ((jax.tree.map(lambda a: a[None], w), jnp.float32), "a stack"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_weight(*arguments)
    with pytest.raises(ValueError, match="for counts and experts"):
        decode_weight(one, jnp.float32, experts=(0, 1))
    with pytest.raises(ValueError, match="of a stack of 2"):
        decode_weight(w, jnp.float32, experts=(1, 2))
