"""prepare and unprepare on trees and modules: what is shared stays shared, the source stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.ops import preparation


class Shared(nnx.Module):
    """One projection under two names, and state of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = self.first
        self.norm = nnx.BatchNorm(64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.norm(self.first(x), use_running_average=True))


@pytest.fixture
def transposing(monkeypatch):
    monkeypatch.setattr(preparation, "cpu_class", lambda: "amx")


def test_a_prepared_module_shares_what_was_shared_and_nothing_with_its_source(transposing):
    model = fdq.quantize(Shared(nnx.Rngs(0)), "W8A8")
    prepared = fdq.prepare(model, "cpu")
    assert prepared.first is prepared.second
    assert prepared.first.kernel.layout == "transposed"
    assert model.first.kernel.layout == "canonical"
    assert prepared.norm.mean is not model.norm.mean
    assert prepared.norm.mean.get_value() is model.norm.mean.get_value()
    x = jax.random.normal(jax.random.key(1), (4, 64))
    np.testing.assert_allclose(prepared(x), model(x), rtol=0, atol=2e-6)
    back = fdq.unprepare(prepared)
    assert back.first is back.second
    kernel = back.first.kernel
    assert type(kernel.codes) is fdq.nn.QCodes and type(kernel.scale) is fdq.nn.QScale
    np.testing.assert_array_equal(back.first.kernel.codes[...], model.first.kernel.codes[...])


def test_a_prepared_tree_keeps_its_structure(transposing):
    q = fdq.quantize(jnp.ones((32, 16)), "W8A16")
    tree = {"a": q, "b": [q, jnp.ones(3)]}
    prepared = fdq.prepare(tree, "cpu")
    assert prepared["a"] is prepared["b"][0]
    assert prepared["a"].data.codes.shape == (16, 32) and prepared["a"].shape == (32, 16)
    assert "transposed" in repr(prepared["a"]) and "[32, 16]" in repr(prepared["a"])
