"""Formats that a user registers work everywhere: in names, products, modules and files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.formats import FORMATS, Format, ScaledFormat, grouping
from fdq.ops.weight_view import view_weight
from tests.closeness import assert_close


class Sign(Format):
    """The least that a format needs: signs and their mean magnitude in each column."""

    name = "sign"
    grammar_name = "Sign"
    aliases = ("binary",)
    bits = 8
    granularities = ("channel",)

    def fit(self, w, spec):
        scale = jnp.mean(jnp.abs(w), axis=-2, keepdims=True)
        return {"scale": scale.astype(spec.scale_dtype)}

    def encode(self, w, spec, parameters=None):
        codes = jnp.where(w < 0, -1, 1).astype(jnp.int8)
        return {"codes": codes, **(parameters or self.fit(w, spec))}

    def decode(self, arrays, spec, *, padding=0, dtype=jnp.float32):
        return (arrays["codes"].astype(jnp.float32) * arrays["scale"]).astype(dtype)

    def shape_from_codes(self, codes, padding):
        return codes

    def padding(self, k):
        return 0


class Ternary(ScaledFormat):
    """Levels -1, 0 and 1 in two bits, with an array of its own: the mean of each group."""

    name = "ternary"
    grammar_name = "T2"
    synonyms = ("trit2",)
    bits = 2
    group_size = 32

    def array_names(self, spec):
        return ("codes", "scale", "mean")

    def fit(self, w, spec):
        groups = grouping.to_groups(w, spec)
        parameters = self.with_multiplier({}, grouping.absolute_maximum(groups) * 0.7, spec)
        return {**parameters, "mean": jnp.mean(groups, axis=-2)}

    def project(self, u, spec, zero=None):
        return jnp.clip(jnp.round(u), -1, 1)

    def to_codes(self, levels, spec, zero):
        return (levels + 1).astype(jnp.uint8)

    def from_codes(self, codes, spec, zero):
        return codes.astype(jnp.float32) - 1


@pytest.fixture(params=[Sign, Ternary], ids=lambda kind: kind.name)
def format(request):
    with FORMATS.registered(request.param()) as format:
        yield format


@pytest.fixture
def name(format):
    return f"W{format.grammar_name}A16C8"


def test_names(format, name):
    scheme = fdq.Scheme.parse(name)
    assert str(scheme) == name and str(scheme.weight) == f"W{format.grammar_name}"
    assert fdq.Scheme.parse(name.lower()) == fdq.Scheme.parse(name.upper()) == scheme
    assert scheme.weight.format == format.name
    spelt = [f"w{synonym}a16c8" for synonym in format.synonyms] + list(format.aliases)
    assert {fdq.Scheme.parse(other).weight for other in spelt} == {scheme.weight}
    with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
        fdq.Scheme.parse(f"W{format.grammar_name}_A16-C8")
    with pytest.raises(ValueError, match=f"granularity 'tensor'.*takes {format.granularities[0]}"):
        fdq.Scheme.parse(f"{name}-tensor")


def test_arrays_and_products(format, name, rng):
    w = jnp.asarray(rng.standard_normal((3, 64, 40)), jnp.float32)
    q = fdq.quantize(w, f"W{format.grammar_name}")
    assert list(q.arrays()) == list(format.array_names(q.spec)) and q.shape == w.shape
    assert format.name in repr(q)
    abstract = fdq.quantize(jax.ShapeDtypeStruct(w.shape, w.dtype), f"W{format.grammar_name}")
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    decoded = fdq.dequantize(q)
    one = jax.tree.map(lambda a: a[1], q)
    assert (view_weight(one) is None) == (format.unit is None)
    x = jnp.asarray(rng.standard_normal((3, 2, 64)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(decoded, np.float64)
    assert_close(jax.vmap(fdq.matmul)(x, q), expected, of_largest=1e-5)
    assert_close(jax.jit(fdq.matmul)(x[1, :1], one), expected[1, :1], of_largest=1e-5)
    assert_close(fdq.matmul(x[1], fdq.prepare(one, "cpu")), expected[1], of_largest=1e-5)
    assert_close(fdq.matmul(x[1], fdq.prepare(one, "gpu")), expected[1], of_largest=1e-5)
    assert_close(fdq.matmul(x[1], one, activation="int8"), expected[1], of_largest=0.02)
    gradient = jax.grad(lambda x: fdq.matmul(x, one).sum())(x[1])
    assert_close(gradient, np.broadcast_to(decoded[1].sum(1), (2, 64)), of_largest=1e-5)


def test_modules_of_others(format, name):
    layer = nnx.Linear(64, 40, rngs=nnx.Rngs(0))
    quantized = fdq.quantize(layer, f"W{format.grammar_name}")
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    expected = x @ np.asarray(fdq.dequantize(quantized.kernel)) + np.asarray(layer.bias)
    assert_close(quantized(jnp.asarray(x)), expected, of_largest=1e-5)


def test_a_file_of_a_format_that_nobody_registered_is_refused(tmp_path):
    with FORMATS.registered(Sign()):
        fdq.save({"w": fdq.quantize(jnp.ones((8, 4)), "WSign")}, tmp_path / "tree")
    with pytest.raises(ValueError, match="format='sign'.*unknown format; use one of int8"):
        fdq.load(tmp_path / "tree")
