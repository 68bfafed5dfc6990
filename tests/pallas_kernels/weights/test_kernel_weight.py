"""Weights in the kernels' layout: there and back, padding, what has no kernel."""

import functools

import jax
import numpy as np
import pytest
from canonical_weights import CASES, Case, decode, random_arrays
from covering import covering

from pallas_kernels.weights.decoded_weight import decoded_weight
from pallas_kernels.weights.formats import WORD_FORMATS
from pallas_kernels.weights.kernel_weight import from_kernel, to_kernel, unsupported

SHAPES = [(256, 136, (2,)), (384, 100, ()), (128, 200, (2, 1))]


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def round_trip(case, k, n, lead=()):
    """Canonical arrays, the kernel's weight, the arrays again and its float32 values."""
    arrays = random_arrays(case, k, n, lead)

    @jax.jit
    def run(arrays):
        weight = to_kernel(arrays, **case.options, k=k, n=n)
        return weight, from_kernel(weight), decoded_weight(weight)

    return arrays, *run(arrays)


@pytest.mark.parametrize(
    ("case", "shape"),
    covering(
        [(case, SHAPES[i % len(SHAPES)]) for i, case in enumerate(CASES)],
        lambda pair: (pair[0].format, pair[0].granularity, pair[0].zero_point, pair[0].double),
    ),
    ids=str,
)
def test_there_and_back_is_the_same_bit_for_bit(case, shape):
    k, n, lead = shape
    arrays, weight, back, values = round_trip(case, k, n, lead)
    assert set(back) == set(arrays)
    assert all(same_bits(back[name], array) for name, array in arrays.items())
    assert weight.shape == (*lead, k, n)
    assert weight.words.shape[-1] % 128 == 0
    expected = decode(case, arrays, k, n)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("format", "k"), [("int8", 1), ("int4", 7), ("int4", 130), ("int2", 100)])
def test_rows_that_fill_no_unit(format, k):
    case = Case(format, "channel", scale_dtype=np.float32)
    arrays, _, back, values = round_trip(case, k, 5)
    assert all(same_bits(back[name], array) for name, array in arrays.items())
    np.testing.assert_allclose(values, decode(case, arrays, k, 5), rtol=1e-6)


def test_shapes_without_arrays():
    case = Case("int4", "group", 128)
    arrays = random_arrays(case, 256, 200, (4,))
    convert = functools.partial(to_kernel, **case.options, k=256, n=200)
    shapes = jax.eval_shape(convert, arrays)
    weight = jax.jit(convert)(arrays)
    assert shapes.layout == weight.layout
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, weight)
    assert shapes.words.shape == (4, 32, 256)
    assert weight.nbytes == 4 * (32 * 256 * 4 + 2 * 256 * 2)


def test_every_format_is_tested():
    assert {case.format for case in CASES} == set(WORD_FORMATS)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("int5", {"granularity": "channel"}, "format 'int5' has no kernel"),
        ("int4", {"granularity": "group", "group_size": 12}, "groups of 12 rows cut"),
        ("int4", {"granularity": "group", "group_size": 24}, "segments of one unit"),
        ("int8", {"granularity": "block", "block_size": (6, 128)}, "groups of 6 rows cut"),
        ("nvfp4", {"granularity": "channel"}, "has scales of groups"),
    ],
)
def test_what_has_no_kernel_says_why(format, options, message):
    assert message in str(unsupported(format, **options))
    with pytest.raises(NotImplementedError, match=message):
        to_kernel({}, format=format, **options, k=48, n=8)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"k": 512}, r"codes of a int4 weight \[512, 200\] .* is \[..., 256, 200\], found"),
        ({}, {"n": 220}, r"found \[128, 200\]"),
        ({"scale": np.ones((3, 200), np.float32)}, {}, r"scale of a int4 .* \[..., 2, 200\]"),
        ({"scale": None}, {}, "needs scale; found codes"),
        ({}, {"zero_point": "integer"}, "needs zero"),
        ({}, {"zero_point": "int"}, "expected a granularity"),
        ({}, {"group_size": None}, "needs group_size"),
    ],
)
def test_arrays_of_another_weight(changes, options, message):
    case = Case("int4", "group", 128)
    arrays = random_arrays(case, 256, 200) | changes
    arrays = {name: a for name, a in arrays.items() if a is not None}
    with pytest.raises(ValueError, match=message):
        to_kernel(arrays, **{**case.options, "k": 256, "n": 200, **options})


def test_what_has_a_kernel():
    assert unsupported("int4", granularity="group", group_size=128) is None
    assert unsupported("int8", granularity="channel") is None
