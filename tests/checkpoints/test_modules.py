"""A user's own NNX module: quantized, saved, and restored into a template."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fdq.formats.qtensor import QTensor
from fdq.linen import apply
from fdq.quantizers.quantization import quantize
from fdq_checkpoints import CheckpointError, load, save, tree_paths
from tests.checkpoints.test_stored_trees import assert_same

WIDTH = 16


class Model(nnx.Module):
    """Attention, a convolution, a weight used twice, stacked layers, dropout and statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=WIDTH, decode=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.layers = layers(rngs)
        self.again = self.embed
        self.parts = nnx.List([nnx.Linear(WIDTH, 8, rngs=rngs), nnx.Linear(8, WIDTH, rngs=rngs)])

    def __call__(self, x):
        x = self.norm(self.conv(self.embed(x)), use_running_average=True)
        x = x + self.attention(x)

        def body(x, layer):
            return layer(x), None

        x, _ = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, self.layers)
        return self.again(x) + self.parts[1](self.parts[0](x))


SCHEME = {"layers": "W8A16", "*": "W4A16-channel"}


@pytest.fixture(scope="module")
def model():
    return quantize(Model(nnx.Rngs(0)), SCHEME, method="absmax")


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("modules") / "model"
    save(model, path)
    return path


def floats():
    return nnx.eval_shape(lambda: Model(nnx.Rngs(0)))


def test_what_is_stored(model):
    values = {tree_paths.dotted(t.path): t.value for t in tree_paths.flatten(model)}
    quantized = {path for path, value in values.items() if isinstance(value, QTensor)}
    assert {"layers.kernel", "parts.0.kernel"} <= quantized
    assert any(path.startswith("attention.query") for path in quantized)
    shared = {path.split(".")[0] for path in values}
    assert ("again" in shared) != ("embed" in shared), "a shared weight is stored once"


@pytest.mark.parametrize(
    "template",
    [
        floats,
        lambda: Model(nnx.Rngs(1)),
        lambda: quantize(floats(), SCHEME, method="absmax"),
        lambda: quantize(Model(nnx.Rngs(1)), SCHEME, method="absmax"),
    ],
    ids=["abstract floats", "floats", "abstract quantized", "quantized"],
)
def test_restore_into_a_template(model, stored, template):
    loaded = load(stored, template=template())
    assert_same(model, loaded)
    assert loaded.again is loaded.embed
    x = np.random.default_rng(3).normal(size=(2, 5, WIDTH)).astype(np.float32)
    run = jax.jit(lambda model, x: model(x))
    model.eval(), loaded.eval()
    np.testing.assert_array_equal(run(model, x), run(loaded, x))


def test_without_a_template_come_nested_dicts(model, stored):
    tree = load(stored)
    assert isinstance(tree["layers"]["kernel"], QTensor)
    expected = {t.path: t.value for t in tree_paths.flatten(model)}
    assert_same(tree_paths.nested(expected), tree)


def test_another_template_is_refused(stored):
    class Other(Model):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            self.more = nnx.Param(jnp.ones(3))

    with pytest.raises(CheckpointError, match="has no tensor more"):
        load(stored, template=nnx.eval_shape(lambda: Other(nnx.Rngs(0))))
    other = quantize(floats(), "W8A16")
    with pytest.raises(CheckpointError, match="stored as W4"):
        load(stored, template=other)


def test_an_unquantized_module(tmp_path):
    model = Model(nnx.Rngs(5))
    save(model, tmp_path / "a")
    assert_same(model, load(tmp_path / "a", template=floats()))
    quantized = load(tmp_path / "a", "W8A16", template=floats())
    assert_same(quantize(model, "W8A16"), quantized)


class Tied(nnx.Module):
    """Two layers of their own biases around one kernel."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_a_tied_weight_stays_tied(tmp_path):
    model = quantize(Tied(nnx.Rngs(0)), "W8A16")
    save(model, tmp_path / "tied")
    loaded = load(tmp_path / "tied", template=nnx.eval_shape(lambda: Tied(nnx.Rngs(0))))
    assert loaded.second is not loaded.first
    assert loaded.second.kernel.codes is loaded.first.kernel.codes
    run = jax.jit(lambda model, x: model(x))
    x = np.ones((2, WIDTH), np.float32)
    np.testing.assert_array_equal(run(model, x), run(loaded, x))


class WithArray(nnx.Module):
    """Holds an array that is no Variable."""

    def __init__(self, value):
        self.table = nnx.data(jnp.full((3,), value))


def test_an_array_of_a_module_that_is_no_variable(tmp_path):
    save(WithArray(2.0), tmp_path / "a")
    loaded = load(tmp_path / "a", template=WithArray(1.0))
    np.testing.assert_array_equal(loaded.table, np.full(3, 2.0))


def test_linen_params(tmp_path):
    layer = linen.Dense(WIDTH)
    x = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    params = quantize(layer.init(jax.random.key(0), x), "W4A16-channel", method="absmax")
    save(params, tmp_path / "params")
    loaded = load(tmp_path / "params")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert isinstance(loaded["params"]["kernel"], QTensor)
    run = jax.jit(lambda params, x: apply(layer, params, x))
    np.testing.assert_array_equal(run(params, x), run(loaded, x))
