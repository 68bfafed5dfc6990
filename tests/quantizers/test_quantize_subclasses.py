"""What `fdq.quantize` reaches in other people's modules by name: subclasses, tables, raw params."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import nn
from fdq.formats.qtensor import QTensor
from fdq.quantizers.quantization import match_table, quantize


def rngs():
    return nnx.Rngs(0)


def close(y, reference, limit=0.02):
    y, reference = np.asarray(y, np.float32), np.asarray(reference, np.float32)
    assert 0 < np.linalg.norm(y - reference) < limit * np.linalg.norm(reference)


class Scaled(nnx.Linear):
    """Does more than its base, by way of it."""

    def __init__(self, *args, rngs):
        super().__init__(*args, rngs=rngs)
        self.gain = nnx.Param(jnp.full((), 3.0))

    def __call__(self, x):
        return super().__call__(x) * self.gain.get_value()


class Own(nnx.Module):
    """Raw params, in the forms that people write."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (64, 32)))
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (3, 32, 16)))
        self.heads = nnx.Param(jax.random.normal(rngs.params(), (64, 4, 8)))
        self.scale = nnx.Param(jnp.ones(16))
        self.state = nnx.BatchStat(jnp.ones((4, 4)))

    def __call__(self, x, expert=1):
        x = jnp.tanh(x @ self.w)
        return (x @ self.experts[expert]) * self.scale.get_value()[None]


X = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)


def test_the_base_of_a_lora_layer():
    layer = nnx.LoRALinear(64, 32, lora_rank=4, rngs=rngs())
    layer.lora.lora_b.set_value(jax.random.normal(jax.random.key(1), (4, 32)))
    model = nnx.Sequential(layer)
    table = match_table(model, "W8A16")
    assert [row.path for row in table.quantized] == ["layers.0.kernel"]
    q = quantize(model, "W8A16")
    assert isinstance(q.layers[0], nnx.LoRALinear) and isinstance(q.layers[0].kernel, QTensor)
    assert type(layer) is nnx.LoRALinear and isinstance(layer.kernel, nnx.Param)
    close(q(X), model(X))
    gradient = nnx.grad(lambda m: m(X).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(q)
    expected = nnx.grad(lambda m: m(X).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    close(nnx.jit(lambda m, x: m(x))(quantize(model, "W8A8"), X), model(X))


def test_subclasses_by_name_do_what_they_did():
    model = nnx.Sequential(Scaled(64, 32, rngs=rngs()), nnx.Linear(32, 8, rngs=rngs()))
    table = match_table(model, "W8A16")
    assert [row.path for row in table.quantized] == ["layers.1.kernel"]
    assert "layers.0.kernel" in table.summary() and "Scaled: needs a rule" in table.summary()
    q = quantize(model, {"layers.0": "W8A16", "*": "W8A16"})
    assert isinstance(q.layers[0], Scaled) and isinstance(q.layers[0].kernel, QTensor)
    close(q(X), model(X))
    twice = quantize(model, {"layers.0": "W8A16", "*": "W8A16"})
    assert type(twice.layers[0]) is type(q.layers[0])
    assert nnx.split(twice)[0] == nnx.split(q)[0]
    assert nnx.clone(q).layers[0].kernel.shape == (64, 32)


def test_embeddings_by_name():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(64, 32, dtype=jnp.bfloat16, rngs=rngs())

        def __call__(self, tokens):
            return self.embed.attend(self.embed(tokens))

    model, tokens = Tied(), jnp.array([[1, 63], [0, 5]])
    with pytest.raises(ValueError, match="embed.embedding .* embed: left unless a rule"):
        quantize(model, "W8A16")
    q = quantize(model, {"embed": "W8A16"})
    assert isinstance(q.embed, nnx.Embed) and isinstance(q.embed.embedding, QTensor)
    assert q.embed(tokens).dtype == q(tokens).dtype == jnp.bfloat16
    close(q.embed(tokens), model.embed(tokens))
    close(q(tokens), model(tokens), 0.03)
    with pytest.raises(ValueError, match="must be an integer"):
        q.embed(jnp.ones(2))


def test_raw_params_by_name():
    model = Own(rngs())
    with pytest.raises(ValueError, match=r"w .*Own: needs a rule that names it, used as x @ w"):
        quantize(model, "W8A16")
    q = quantize(model, {"w": "W8A16", "experts": "W8A16"})
    assert isinstance(q.w, QTensor) and q.experts.shape == (3, 32, 16)
    close(q(X), model(X))
    close(nnx.jit(lambda m, x: m(x))(q, X), model(X))
    assert list(nnx.state(q, nnx.Param)) == ["heads", "scale"]
    reasons = {row.path: row.reason for row in match_table(model, {"w": "W8"}).left}
    assert reasons["heads"] == "would be 64 matrices [4, 8]"
    assert reasons["scale"] == "vector" and reasons["state"] == "Own: not quantized"
    with pytest.raises(ValueError, match="contract= is for plain trees"):
        quantize(model, [("w", "W8", {"contract": 1})])


def test_activations_that_have_no_place_in_a_module_are_said(caplog, capsys):
    class Both(nnx.Module):
        def __init__(self, rngs):
            self.own = Own(rngs)
            self.embed = nnx.Embed(64, 64, rngs=rngs)
            self.out = nnx.Linear(64, 32, rngs=rngs)

    model, recipe = Both(rngs()), {"own.w": "W8A8", "*embed*": "W8A8", "*": "W8A8"}
    with caplog.at_level("WARNING", "fdq"):
        q = quantize(model, recipe)
        said = "Activations are not quantized where fdq does not form the product: "
        assert f"{said}embed.embedding, own.w." in caplog.text
        caplog.clear()
        quantize(model, {"own.w": "W8A16", "*": "W8A8"})
        assert not caplog.text
    assert str(q.out.activation) == "A8"
    table = match_table(model, recipe)
    rows = {row.path: row for row in table.quantized}
    assert (
        str(rows["out.kernel"].scheme) == "W8A8C16" and "without" not in rows["out.kernel"].reason
    )
    for path, pattern in (("own.w", "own.w"), ("embed.embedding", "*embed*")):
        assert str(rows[path].scheme) == "W8A16C16"
        assert rows[path].reason == f"rule {pattern!r}, without A8"
    assert said in str(table)
    quantize(model, recipe, verbose=True)
    assert said in capsys.readouterr().out


def test_linen_modules_in_a_bridge():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return flax.linen.Dense(8, name="down")(jnp.tanh(flax.linen.Dense(32, name="up")(x)))

    for module, rule, path in (
        (Net(), "up", "up.kernel"),
        (flax.linen.Dense(8), "kernel", "kernel"),
    ):
        model = nnx.bridge.ToNNX(module, rngs=rngs()).lazy_init(X)
        reference = model(X)
        q = quantize(model, {rule: "W8A16"})
        assert [row.path for row in match_table(model, {rule: "W8A16"}).quantized] == [path]
        close(q(X), reference)
        close(nnx.jit(lambda m, x: m(x))(q, X), reference)
        np.testing.assert_array_equal(model(X), reference)
        held = q.up["kernel"] if rule == "up" else q.kernel
        assert isinstance(held, QTensor)
        with pytest.raises(NotImplementedError, match="no mutable collections"):
            q(X, mutable=["batch_stats"])
        with pytest.raises(ValueError, match="nnx.ToNNX: needs a rule that names it"):
            quantize(model, "W8A16")


def test_an_abstract_subclass_stays_abstract():
    model = nnx.eval_shape(lambda: nnx.Sequential(Scaled(64, 32, rngs=rngs())))
    q = quantize(model, {"layers.0": "W4A16-g32"})
    assert isinstance(q.layers[0], Scaled)
    assert nn.value(q.layers[0].kernel).is_abstract
    assert fdq.dequantize(nn.value(q.layers[0].kernel)).shape == (64, 32)
