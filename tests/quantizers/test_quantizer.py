"""Quantizers as objects: who is chosen, what it is given, and one from outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.calibration.statistics import KeyValueRange
from fdq.formats import FORMATS
from fdq.quantizers import QUANTIZERS, Quantizer, pick, quantize_array
from fdq.schemes.scheme import Scheme, WeightSpec

G32 = Scheme.parse("W4A16-g32").weight
assert G32 is not None


class Halved(Quantizer):
    """A toy: absmax of half the weight, larger where the input of a row is larger."""

    name = "halved"
    statistics = ("absmax",)

    def __init__(self, *required):
        self.required = required

    def unsupported(self, spec, dtype=jnp.float32):
        return None if spec.format == "int4" else "is a toy for int4"

    def matrix(self, w, spec, statistics):
        factor = jnp.max(statistics["absmax"]) if "absmax" in statistics else jnp.float32(0.5)
        format = FORMATS[spec.format]
        return format.encode(w * factor, spec, format.fit(w * factor, spec))


def expected(w, factor=0.5):
    return quantize_array(jnp.asarray(w) * np.float32(factor), G32, method="absmax")


def same(q, other):
    for name, array in other.arrays().items():
        np.testing.assert_array_equal(np.asarray(q.arrays()[name]), np.asarray(array))


@pytest.fixture
def toy():
    with QUANTIZERS.registered(Halved()) as quantizer:
        yield quantizer


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("W8", "absmax"),
        ("W4", "search"),
        ("W3", "search"),
        ("Wfp8", "absmax"),
        ("WNF4", "search"),
        ("WMXFP8", "absmax"),
        ("WMXFP4", "search"),
        ("WNVFP4", "search"),
        ("WCC2", "search"),
    ],
)
def test_the_default_is_a_search_for_four_bits_and_fewer(spec, name):
    assert pick(WeightSpec.parse(spec), None).name == name


@pytest.mark.parametrize(
    ("spec", "able"),
    [
        ("W8", "'search', 'absmax', 'signed_max', 'gptq', 'gptq2', 'fastdeploy', 'fastdeploy-cpu'"),
        ("W4", "'search', 'absmax', 'signed_max', 'gptq', 'gptq2'"),
        ("W4-asym", "'search', 'absmax', 'gptq', 'gptq2'"),
        ("W4-affine", "'search', 'absmax', 'hqq', 'gptq', 'gptq2'"),
        ("Wfp8", "'absmax', 'gptq', 'gptq2'"),
        ("WNVFP4", "'search', 'absmax', 'four_over_six', 'gptq', 'gptq2'"),
        ("WCC2", "'search', 'ccq', 'ccq2'"),
    ],
)
def test_a_name_that_there_is_not_lists_those_that_there_are(spec, able):
    with pytest.raises(
        ValueError, match=rf"a\.b: format .* no method 'magic'; use one of {able}\."
    ):
        pick(WeightSpec.parse(spec), "magic", "a.b")


def test_one_registered_from_outside_quantizes_arrays_trees_and_modules(toy, rng):
    w = rng.standard_normal((64, 16)).astype(np.float32)
    same(quantize_array(w, G32, method="halved"), expected(w))
    stack = rng.standard_normal((3, 64, 16)).astype(np.float32)
    same(quantize_array(stack, G32, method="halved"), expected(stack))
    mapped = jax.vmap(lambda w: quantize_array(w, G32, method="halved"))(jnp.asarray(stack))
    same(mapped, expected(stack))
    abstract = quantize_array(jax.ShapeDtypeStruct((64, 16), jnp.float32), G32, method="halved")
    assert abstract.codes.shape == (32, 16)
    module = fdq.quantize(nnx.Linear(64, 16, rngs=nnx.Rngs(0)), "W4A16-g32", method="halved")
    same(module.kernel, expected(nnx.Linear(64, 16, rngs=nnx.Rngs(0)).kernel.get_value()))
    rules = {"a": ["W4A16-g32", {"quantizer": "halved"}], "*": "W4A16-g32"}
    tree = fdq.quantize({"a": {"w": w}, "b": {"w": w}}, rules, method="absmax")
    same(tree["a"]["w"], expected(w))
    same(tree["b"]["w"], expected(w, 1.0))
    row = fdq.match_table({"a": {"w": w}, "b": {"w": w}}, rules).rows[0]
    assert (row.quantizer, row.reason) == ("halved", "rule 'a', by halved")


def test_a_rule_says_which_quantizer_also_under_compat(toy, rng):
    w = jnp.asarray(rng.standard_normal((128, 16)), jnp.bfloat16)
    rules = [("a", "W4A16-channel", {"quantizer": "absmax"}), ("*", "wint4")]
    q = fdq.quantize({"a": {"w": w}, "b": {"w": w}}, rules, compat="fastdeploy")
    same(q["a"]["w"], quantize_array(w, q["a"]["w"].spec, method="absmax"))
    same(q["b"]["w"], quantize_array(w, q["b"]["w"].spec, compat="fastdeploy"))
    with pytest.raises(
        ValueError, match=r"b\.w: format int8 has no method 'halved', which is a toy"
    ):
        fdq.quantize({"b": {"w": w}}, [("b", "W8", {"quantizer": "halved"})])


def statistics(**fields):
    values = {name: np.full(64, 2.0, np.float32) for name in fields}
    return fdq.Calibration(absmax=dict(values), mean_square=dict(fields), cache=(), tokens=1)


def test_it_gets_the_statistics_that_it_asks_for(toy, rng):
    w = rng.standard_normal((64, 16)).astype(np.float32)
    seen = statistics(**{"a.kernel": np.ones(64, np.float32)})
    tree = {"a": {"kernel": w}, "b": {"kernel": w.copy()}}
    q = fdq.quantize(tree, "W4A16-g32", method="halved", calibration=seen)
    same(q["a"]["kernel"], expected(w, 2.0))
    same(q["b"]["kernel"], expected(w))
    with pytest.raises(ValueError, match=r"a\.w: expected absmax of shape \(64,\), found \(8,\)"):
        quantize_array(w, G32, method="halved", statistics={"absmax": np.ones(8)}, path="a.w")


def test_one_that_cannot_do_without_says_so(rng):
    w = rng.standard_normal((64, 16)).astype(np.float32)
    with (
        QUANTIZERS.registered(Halved("absmax")),
        pytest.raises(ValueError, match=r"a\.w: quantizer 'halved' needs the absmax .*fdq\.calib"),
    ):
        fdq.quantize({"a": {"w": w}}, "W4A16-g32", method="halved")


def test_calibration_guides_the_search(rng):
    w = rng.standard_normal((64, 16)).astype(np.float32)
    h = np.exp(rng.standard_normal(64)).astype(np.float32)
    q = fdq.quantize({"a": {"kernel": w}}, "W4A16-g32", calibration=statistics(**{"a.kernel": h}))
    same(q["a"]["kernel"], quantize_array(w, G32, importance=h))
    other = statistics(**{"c.kernel": h})
    with pytest.raises(ValueError, match=r"statistics of another model, of c\.kernel"):
        fdq.quantize({"a": {"kernel": w}}, "W4A16-g32", calibration=other)


class KeepsScales(nnx.Module):
    """Not fdq's decoder, but it can keep the scales of a static cache."""

    def __init__(self):
        self.linear = nnx.Linear(64, 16, rngs=nnx.Rngs(0))
        self.kept = nnx.data(None)

    def set_cache_scales(self, scales):
        self.kept = nnx.data([one.k for one in scales])


def test_static_cache_scales_go_to_whoever_can_keep_them():
    ends = {name: np.full((2, 8), 1.27, np.float32) for name in ("k_max", "v_max")}
    ends |= {name: np.zeros((2, 8), np.float32) for name in ("k_min", "v_min")}
    seen = fdq.Calibration(
        absmax={"linear.kernel": np.ones(64, np.float32)},
        mean_square={"linear.kernel": np.ones(64, np.float32)},
        cache=(KeyValueRange(**ends),),
        tokens=1,
    )
    model = fdq.quantize(KeepsScales(), "W8A16C8-kvchannel", calibration=seen)
    np.testing.assert_allclose(model.kept[0], np.full((2, 8), 0.01), rtol=1e-6)
    assert fdq.quantize(KeepsScales(), "W8A16C8-kvchannel").kept is None
    assert fdq.quantize(KeepsScales(), "W8A16C8", calibration=seen).kept is None


def test_numbers_that_only_float64_holds_are_refused():
    w = np.ones((128, 2))
    for size in (1e-300, 1e-60):
        with pytest.raises(ValueError, match=rf"the largest magnitude is {size}; W4 holds weights"):
            fdq.quantize(w * size, "W4A16")


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_constant_is_quantized_inside_jit_and_looked_at(kind, rng):
    w = kind(rng.standard_normal((128, 2)).astype(np.float32))
    x = jnp.ones((1, 128))
    made = jax.jit(lambda x: fdq.matmul(x, fdq.quantize(w, "W8A16")))(x)
    np.testing.assert_allclose(made, fdq.matmul(x, fdq.quantize(w, "W8A16")), rtol=1e-5, atol=1e-5)
    wrong = w * np.nan
    with pytest.raises(ValueError, match="values are NaN or infinite"):
        jax.jit(lambda x: fdq.matmul(x, fdq.quantize(wrong, "W8A16")))(x)
