"""One behavioural suite over every format of the shared table."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fdq.formats import FORMATS
from fdq.formats.qtensor import QTensor, dequantize
from fdq.quantizers import pick, quantize_array
from tests.covering import covering, longest, slow, slow_but
from tests.formats.cases import (
    CASES,
    VARIED,
    defined_value,
    levels_of,
    scale_of,
    spec,
    spread,
    stack,
)

every_format = pytest.mark.parametrize(
    "case",
    covering(CASES, lambda c: (c.family, c.spec.granularity, c.spec.zero_point)),
    ids=str,
)
# All widths of a trellis are one code, and its search takes long.
WIDTHS = [f"trellis{bits}" for bits in ("1.5", "2.5", "3", "3.5", "4")]
varied_formats = pytest.mark.parametrize(
    "case",
    [
        *slow_but(VARIED, [case for case in CASES if str(case) not in WIDTHS]),
        *(longest(case) for case in CASES if str(case) in WIDTHS),
    ],
    ids=str,
)
decode = jax.jit(dequantize)


def same_bits(a, b):
    """Leaf by leaf the same dtype, shape and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(
            np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8), strict=True
        )


def test_the_table_has_every_format():
    assert {case.spec.format for case in CASES} == set(FORMATS)


@every_format
def test_decode_is_the_definition(case):
    q = case.quantized
    expected = defined_value(q, case.k, case.n)
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(np.asarray(decode(q)), expected)
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16


@every_format
def test_every_weight_has_its_nearest_level(case):
    if case.spec.format.startswith(("cc2", "trellis")):
        pytest.skip("several weights share a code; see test_convolutional.py and test_trellis.py")
    q, w = case.quantized, case.weight.astype(np.float64)
    scale = scale_of(q, case.k, case.n).astype(np.float64)
    zero, offset = (
        spread(np.asarray(getattr(q, name), np.float64), case.spec, case.k, case.n)
        if case.spec.zero_point == kind
        else np.float64(0)
        for kind, name in (("integer", "zero"), ("offset", "offset"))
    )
    levels = np.unique(levels_of(case.spec))
    u = (w - offset) / scale + zero
    right = np.clip(np.searchsorted(levels, u), 1, len(levels) - 1)
    nearest = np.minimum(np.abs(u - levels[right]), np.abs(u - levels[right - 1]))
    found = np.abs(np.asarray(decode(q), np.float64) - w)
    rounding = 2.0**-22 * np.abs(levels).max() * np.abs(scale)  # of w / scale in float32
    assert np.all(found <= nearest * np.abs(scale) + rounding)
    if case.spec.format.startswith("int"):
        half = 0.5 * np.abs(scale) + rounding
        clipped = (u < levels[0]) | (u > levels[-1])
        assert np.all((found <= half) | clipped)
        if pick(case.spec, case.method).name == "absmax":
            # Only what the rounding of scale (zero, offset) moved out of range was clipped.
            excess = 2.0**-8 * np.abs(w) + (case.spec.zero_point == "integer") * half
            excess += 2.0**-8 * (np.abs(w - offset) + np.abs(offset)) * (offset != 0)
            assert np.all(found <= half + excess)


@varied_formats
def test_vmap_stack_and_abstract_quantization_agree(case):
    w = stack(case)
    if case.n > 16:
        w = w[..., : max(16, case.n // 4)]
    whole = quantize_array(w, case.spec, method=case.method)
    mapped = jax.vmap(lambda w: quantize_array(w, case.spec, method=case.method))(w)
    same_bits(whole, mapped)
    assert whole.shape == mapped.shape == w.shape
    each = [quantize_array(one, case.spec, method=case.method) for one in w]
    same_bits(jax.tree.map(lambda *a: jnp.stack(a), *each), whole)
    assert jax.tree.structure(each[0]) == jax.tree.structure(whole)
    for layer in range(len(w)):
        one = jax.tree.map(lambda a: a[layer], whole)  # noqa: B023
        assert one.shape == w.shape[1:]
        np.testing.assert_array_equal(
            np.asarray(dequantize(one)), np.asarray(dequantize(whole)[layer])
        )
    abstract = quantize_array(
        jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), case.spec, method=case.method
    )
    assert jax.tree.structure(abstract) == jax.tree.structure(whole)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(abstract)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(whole)
    ]
    assert abstract.shape == w.shape
    assert abstract.nbytes == whole.nbytes
    assert dequantize(abstract) == jax.ShapeDtypeStruct(w.shape, jnp.float32)


@varied_formats
def test_decodes_inside_vmap_and_scan(case):
    q = case.quantized
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    seen = []

    def layer(carry, q: QTensor):
        seen.append(q.shape)
        w = dequantize(q)
        return carry + w, w[:1]

    zero = jnp.zeros((case.k, case.n), jnp.float32)
    total, _ = jax.lax.scan(layer, zero, stacked)
    assert set(seen) == {(case.k, case.n)}
    expected = np.asarray(decode(q))
    np.testing.assert_array_equal(np.asarray(total), 2 * expected)
    both = jax.vmap(dequantize)(stacked)
    np.testing.assert_array_equal(np.asarray(both[1]), expected)


@pytest.mark.parametrize(
    ("axis", "axis_type"),
    [
        ("K", AxisType.Explicit),
        ("N", AxisType.Auto),
        slow("K", AxisType.Auto),
        slow("N", AxisType.Explicit),
    ],
    ids=lambda value: getattr(value, "name", value),
)
@varied_formats
def test_decodes_sharded(case, axis, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    q = case.quantized
    dimension = -2 if axis == "K" else -1
    full = {-2: case.k, -1: case.n}[dimension]

    def partition(a):
        # Scales that are coarser than a shard are replicated.
        sharded = a.shape[dimension] % 8 == 0
        assert sharded or a.shape[dimension] <= max(1, full // 1024)
        return P(*(("x", None) if axis == "K" else (None, "x"))) if sharded else P(None, None)

    specs = jax.tree.map(partition, q)
    placed = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), q, specs)
    out = P("x", None) if axis == "K" else P(None, "x")
    shapes = []

    def local(q: QTensor):
        shapes.append(q.shape)
        return dequantize(q)

    expected = np.asarray(decode(q))
    shard_map = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out))
    np.testing.assert_array_equal(np.asarray(shard_map(placed)), expected)
    wanted = (case.k // 8, case.n) if axis == "K" else (case.k, case.n // 8)
    assert set(shapes) == {wanted}
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(np.asarray(decode(placed)), expected)


@every_format
def test_bits_per_weight_counts_the_arrays(case):
    q = case.quantized
    stored = sum(np.asarray(a).nbytes for a in q.arrays().values())
    assert q.nbytes == stored
    assert q.bits_per_weight == 8 * stored / (case.k * case.n)
    format = FORMATS[case.spec.format]
    assert format.bits_per_weight(case.spec, (case.k, case.n)) == q.bits_per_weight
    assert format.shape_from_codes(q.codes.shape, q.padding) == (case.k, case.n)
    assert q.size == case.k * case.n
    assert q.ndim == 2


@every_format
def test_zero_groups_and_sizes_from_tiny_to_huge(case):
    w = case.weight.copy()
    w[:, 0] = 0
    w[:256, 1:3] = 0
    for size in (1.0, 1e30, 1e-30):
        if case.spec.scale_dtype == "float16" and size != 1:
            with pytest.raises(ValueError, match="the largest magnitude is .*wider dtype"):
                quantize_array(w * np.float32(size), case.spec, method=case.method)
            continue
        q = quantize_array(w * np.float32(size), case.spec, method=case.method)
        back = np.asarray(dequantize(q), np.float64) / size
        assert np.isfinite(back).all()
        assert np.all(np.abs(back[:, 0]) <= 1e-7)
        # A scale (of cc2, a local one) of 0 means that all weights are.
        if not case.spec.format.startswith(("cc2", "trellis")):
            scale = scale_of(q, case.k, case.n)
            assert np.all(np.isfinite(scale))
            assert np.all(scale != 0)
            if case.spec.scale_dtype in ("float32", "bfloat16"):
                coarse = case.spec.granularity in ("tensor", "block")
                special = coarse or case.spec.zero_point == "half" or case.spec.double_quantization
                assert special or np.all(scale[:, 0] == 1)
        error = np.sum((back - w) ** 2) / np.sum(w.astype(np.float64) ** 2)
        assert error < 0.75, f"{size=}: {error=}"


@pytest.mark.parametrize("k", [1, 37, 130])
@pytest.mark.parametrize(
    "s",
    [
        spec("int8"),
        spec("int4"),
        spec("int3"),
        spec("int2", zero_point="half"),
        spec("float8_e5m2"),
        spec("float8_e4m3", granularity="block", block_size=(128, 128)),
    ],
    ids=str,
)
def test_odd_shapes_and_padding(s, k, rng):
    w = rng.standard_normal((k, 131)).astype(np.float32)
    q = quantize_array(w, s, method="absmax")
    assert q.shape == (k, 131)
    assert dequantize(q).shape == (k, 131)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), defined_value(q, k, 131))
    assert q.bits_per_weight == FORMATS[s.format].bits_per_weight(s, (k, 131))


def test_every_float_dtype_is_taken(rng):
    w = rng.standard_normal((64, 8))
    for dtype in (np.float64, np.float32, np.float16, jnp.bfloat16):
        q = quantize_array(w.astype(dtype), spec("int8"))
        expected = quantize_array(jnp.asarray(w.astype(dtype), jnp.float32), spec("int8"))
        same_bits(q, expected)


def test_wrong_inputs_say_what_is_wrong():
    w = jnp.ones((64, 8), jnp.float32)
    groups = spec("int4", 128)
    with pytest.raises(ValueError, match=r"a\.b: K=64 .* group_size=128; .*-g64"):
        quantize_array(w, groups, path="a.b")
    with pytest.raises(ValueError, match=r"a\.b: K=37 .*one scale per channel"):
        quantize_array(jnp.ones((37, 8)), groups, path="a.b")
    bad = w.at[3, 2].set(jnp.nan).at[5, 1].set(jnp.inf)
    with pytest.raises(ValueError, match=r"a\.b: 2 of 512 .*first at \[3, 2\]"):
        quantize_array(bad, spec("int8"), path="a.b")
    with pytest.raises(ValueError, match=r"a\.b: expected a float weight .*int32"):
        quantize_array(jnp.ones((64, 8), jnp.int32), spec("int8"), path="a.b")
    with pytest.raises(ValueError, match=r"a\.b: expected a float weight .*\(64,\)"):
        quantize_array(jnp.ones((64,)), spec("int8"), path="a.b")
    with pytest.raises(ValueError, match=r"a\.b: format int4 has no method 'four_over_six'"):
        quantize_array(w, spec("int4"), method="four_over_six", path="a.b")
    with pytest.raises(ValueError, match=r"a\.b: K=32"):
        quantize_array(w[:32], spec("cc2", 64, "uint4"), path="a.b")
    with pytest.raises(ValueError, match="importance"):
        quantize_array(w, spec("int8"), importance=jnp.ones(64), path="a.b")
    with pytest.raises(ValueError, match=r"a\.b: expected importance of shape \(64,\)"):
        quantize_array(w, spec("int4"), importance=jnp.ones(8), path="a.b")
    unknown = dataclasses.replace(spec("int8"))
    object.__setattr__(unknown, "format", "int5")
    with pytest.raises(ValueError, match=r"a\.b: unknown weight format 'int5'; known are int8"):
        quantize_array(w, unknown, path="a.b")


@every_format
def test_what_a_trace_cannot_refuse_decodes_to_nan(case):
    """One bad weight of a matrix; the other matrix of the stack is as it was."""
    s = case.spec
    k, closed = max(s.group_size or 0, 128), FORMATS[s.format].closed_form

    @jax.jit
    def decoded(w):
        return dequantize(quantize_array(w, s, method="absmax" if closed else None))

    w = np.random.default_rng(0).standard_normal((2, k, 16)).astype(np.float32)
    expected = np.asarray(decoded(w))
    assert np.isfinite(expected).all() and expected.any()
    for wrong in (np.nan, np.inf, 3e38):
        bad = w.copy()
        bad[1, 5, 1] = wrong
        found = np.asarray(decoded(bad))
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[0], expected[0])
    found = np.asarray(decoded(w * np.array([[[1]], [[1e-39]]], np.float32)))
    assert np.isnan(found[1]).all() and np.isfinite(found[0]).all()


@every_format
def test_weights_at_the_ends_of_the_range_are_right_or_refused(case):
    """No wrong value in silence: as good as at 1 inside of the bounds, an error outside."""
    s = case.spec
    k = max(s.group_size or 0, 128)
    w = np.random.default_rng(0).standard_normal((k, 16)).astype(np.float32)
    w /= np.abs(w).max()

    def error(size):
        # Powers of two, by which float32 is scaled exactly.
        q = quantize_array(np.ldexp(w, size), s, method=case.method, path="a.b")
        back = np.ldexp(np.asarray(dequantize(q), np.float64), -size)
        return np.linalg.norm(back - w) / np.linalg.norm(w)

    low, high = FORMATS[s.format].magnitudes(s)
    usual = error(0)
    for size in (math.ceil(math.log2(low)), math.floor(math.log2(high))):
        assert error(size) < 1.05 * usual + 1e-3
    for size in (math.floor(math.log2(low)) - 1, -140, math.floor(math.log2(high)) + 1, 127):
        with pytest.raises(ValueError, match=r"a\.b: the largest magnitude is .* holds weights"):
            error(size)
    assert not np.asarray(dequantize(quantize_array(0 * w, s, method=case.method))).any() or (
        s.zero_point == "half"
    )
