"""int8 activations times integer weights by four-byte dots, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import slow

import fdq
from fdq.ops.prepared_weight import kernel_weight
from fdq.schemes.scheme import WeightSpec
from pallas_kernels.matmul.integer import (
    dot4_reference,
    integer_matrix_vector,
    integer_matrix_vector_reference,
    x_words,
)
from pallas_kernels.weights.formats import WORD_FORMATS

BOUND = 5e-6


def spec(format, group=None, zero_point="none"):
    granularity = "channel" if group is None else "group"
    scale_dtype = "float32" if group is None else "bfloat16"
    return WeightSpec(
        format=format,
        granularity=granularity,
        group_size=group,
        zero_point=zero_point,
        scale_dtype=scale_dtype,
    )


def weight(rng, k, n, kind):
    return fdq.quantizers.quantize_array(
        jnp.asarray(rng.standard_normal((k, n)), jnp.float32), kind
    )


@pytest.mark.parametrize(
    ("kind", "k", "n", "m"),
    [
        slow(spec("int8"), 200, 100, 3),
        slow(spec("int8"), 512, 256, 1),
        slow(spec("int4"), 328, 128, 2),
        slow(spec("int4", 128), 512, 200, 8),
        (spec("int4", 64, "integer"), 256, 128, 4),
        slow(spec("int4", 128, "half"), 256, 128, 1),
        (spec("int2", 64), 256, 128, 5),
    ],
    ids=str,
)
def test_products_are_those_of_the_definition(kind, k, n, m, rng):
    q = weight(rng, k, n, kind)
    codes = rng.integers(-127, 128, (m, k))
    x = jnp.asarray(codes, jnp.int8)
    w = kernel_weight(q)
    y = integer_matrix_vector(x, w)
    wanted = codes.astype(np.float64) @ np.asarray(fdq.dequantize(q), np.float64)
    largest = np.abs(wanted).max()
    assert largest > 0
    assert np.abs(np.asarray(y, np.float64).sum(0) - wanted).max() <= BOUND * largest
    reference = np.asarray(integer_matrix_vector_reference(x, w), np.float64)[0]
    assert np.abs(reference - wanted).max() <= BOUND * largest
    np.testing.assert_array_equal(y, integer_matrix_vector(x, w))


def test_sums_are_exact_integers(rng):
    """The largest codes, 4096 of them: beyond what float32 sums could hold."""
    q = weight(rng, 4096, 128, spec("int8"))
    q = q.replace(codes=jnp.full((4096, 128), 127, jnp.int8), scale=jnp.ones((1, 128)))
    x = jnp.full((1, 4096), 127, jnp.int8).at[0, 0].set(126)
    y = np.asarray(integer_matrix_vector(x, kernel_weight(q)), np.float64).sum(0)
    assert np.abs(y - (127 * 127 * 4096 - 127)).max() <= 4  # of the float32 result


def test_four_byte_dot_is_that_of_numpy(rng):
    a, b = (rng.integers(-128, 128, (64, 4)).astype(np.int8) for _ in range(2))
    c = rng.integers(-1000, 1000, 64).astype(np.int32)
    words = [jnp.asarray(v.view(np.int32)[:, 0]) for v in (a, b)]
    wanted = c + (a.astype(np.int32) * b.astype(np.int32)).sum(1)
    np.testing.assert_array_equal(dot4_reference(*words, jnp.asarray(c)), wanted)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_planes_hold_every_code_once(bits, rng):
    word = rng.integers(-(2**31), 2**31, 16).astype(np.int32)
    planes = [np.asarray(p) for p in WORD_FORMATS[f"int{bits}"].signed_planes(jnp.asarray(word))]
    signed = np.stack([p.view(np.int8).reshape(16, 4) for p in planes], axis=-1).astype(int)
    fields = word.view(np.uint32)[:, None] >> np.arange(0, 32, bits, dtype=np.uint32)
    codes = (fields & (2**bits - 1)).astype(int) - 2 ** (bits - 1)
    np.testing.assert_array_equal(signed.reshape(16, -1), codes * 2 ** (8 - bits))


def test_activations_are_packed_as_planes_hold_codes(rng):
    w = kernel_weight(weight(rng, 128, 128, spec("int4", 64)))
    x = jnp.asarray(np.arange(128)[None] - 64, jnp.int8)
    words = np.asarray(x_words(x, w))
    assert words.shape == (16, 2, 1)
    first = words[0, :, 0].copy().view(np.int8).reshape(2, 4) + 64
    np.testing.assert_array_equal(first, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_vmap_over_rows_and_over_weights(rng):
    q = weight(rng, 128, 128, spec("int8"))
    x = jnp.asarray(rng.integers(-127, 128, (3, 2, 128)), jnp.int8)
    w = kernel_weight(q)
    many = jax.vmap(lambda x: integer_matrix_vector(x, w).sum(0))(x)
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 3), w)
    each = jax.vmap(lambda x, w: integer_matrix_vector(x, w).sum(0))(x, stacked)
    wanted = np.asarray(x, np.float64) @ np.asarray(fdq.dequantize(q), np.float64)
    assert jax.vmap(lambda x, w: integer_matrix_vector(x, w))(x, stacked).ndim == 4
    for y in (many, each):
        assert np.abs(y - wanted).max() <= BOUND * np.abs(wanted).max()


def test_wrong_inputs_are_named(rng):
    w = kernel_weight(weight(rng, 128, 128, spec("int8")))
    with pytest.raises(ValueError, match=r"expected int8 x \[M, K\] of 1 .. 8 rows, found float32"):
        integer_matrix_vector(jnp.ones((1, 128)), w)
    with pytest.raises(ValueError, match=r"found int8 \(9, 128\); use XLA"):
        integer_matrix_vector(jnp.ones((9, 128), jnp.int8), w)
    with pytest.raises(ValueError, match=r"needs a weight \[K=64, N\]"):
        integer_matrix_vector(jnp.ones((1, 64), jnp.int8), w)
