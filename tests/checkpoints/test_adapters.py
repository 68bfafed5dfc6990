"""Models with adapters and heads of their own: the base loads plainly, the others beside it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdq.quantizers.quantization import quantize
from fdq_checkpoints import CheckpointError, convert, inspect, load, save, tree_paths, verify
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same
from tests.covering import slow

FAMILY = builders.MODELS / "qwen3"
TOKENS = np.arange(6, dtype=np.int32).reshape(1, 6)


def lora(layer):
    """A layer with a low-rank update that is not zero."""
    k, n = layer.kernel.shape
    wrapped = nnx.LoRA(k, 2, n, base_module=layer, rngs=nnx.Rngs(1))
    wrapped.lora_b.set_value(jnp.full((2, n), 0.1))
    return wrapped


class Scaled(nnx.Module):
    """A wrapper of somebody's, whose names are its own; it has a key and a layer as well."""

    def __init__(self, inner):
        self.inner = inner
        self.gain = nnx.Param(jnp.full(inner.kernel.shape[-1:], 0.5))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(5))
        self.adapter = nnx.Linear(inner.kernel.shape[0], 3, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.inner(x) * self.gain[None, None] + self.adapter(x).sum(-1, keepdims=True)


def wrap_with_lora(model):
    attention, mlp = model.layers[0].self_attn, model.layers[1].mlp
    attention.o_proj, attention.qkv_proj = lora(attention.o_proj), lora(attention.qkv_proj)
    mlp.down_proj = lora(mlp.down_proj)
    return model


def wrap_twice_and_add_a_head(model):
    mlp = model.layers[1].mlp
    mlp.down_proj = lora(mlp.down_proj)
    mlp.down_proj.base_module = Scaled(mlp.down_proj.base_module)
    model.value_head = nnx.Linear(model.config.hidden_size, 1, rngs=nnx.Rngs(3))
    return model


def abstract(model):
    return nnx.eval_shape(lambda: nnx.clone(model))


def run(model):
    return jax.jit(lambda model, tokens: model(tokens))(model, TOKENS)


@pytest.mark.parametrize(
    ("wrap", "scheme"),
    [
        (wrap_with_lora, "W8A16C8"),
        (wrap_twice_and_add_a_head, None),
        slow(wrap_with_lora, None),
        slow(wrap_twice_and_add_a_head, "W8A16C8"),
    ],
)
def test_the_base_loads_plainly_and_a_template_brings_the_adapters(tmp_path, wrap, scheme, caplog):
    base = load(FAMILY, scheme)
    model = wrap(load(FAMILY, scheme))
    model.eval()
    save(model, tmp_path / "out")
    with caplog.at_level(logging.WARNING, "fdq"):
        plain = load(tmp_path / "out")
    assert "out/adapters has its adapters" in caplog.text
    assert_same(base, plain)
    assert plain.scheme == base.scheme
    adapters = load(tmp_path / "out" / "adapters")
    names = {tree_paths.dotted(t.path) for t in tree_paths.flatten(adapters)}
    known = {tree_paths.dotted(t.path) for t in tree_paths.flatten(model)}
    assert len(names) >= 4 and names < known
    assert "layers.1.mlp.down_proj.lora_a" in names
    for template in (model, abstract(wrap(load(FAMILY)))):
        again = load(tmp_path / "out", template=template)
        assert_same(model, again)
    assert inspect(tmp_path / "out", verify=True).kind == "model"
    with pytest.raises(CheckpointError, match="has no tensor"):
        save(base, tmp_path / "base")
        load(tmp_path / "base", template=model)
    damaged = next((tmp_path / "out" / "adapters" / "weights").glob("**/d/*"))
    damaged.unlink()
    with pytest.raises(CheckpointError, match="out/adapters/weights"):
        verify(tmp_path / "out")


@pytest.mark.slow
def test_what_a_template_brought_together_computes_the_same(tmp_path):
    model = wrap_twice_and_add_a_head(load(FAMILY, "W8A16C8"))
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", template=model)
    model.eval(), again.eval()
    np.testing.assert_array_equal(run(model), run(again))
    base = load(tmp_path / "out")
    assert np.abs(np.asarray(run(model) - run(base))).max() > 1e-2


def test_adapters_stay_beside_a_base_that_is_converted(tmp_path):
    model = wrap_with_lora(load(FAMILY))
    save(model, tmp_path / "float")
    convert(tmp_path / "float", tmp_path / "w8", "W8A16")
    assert_same(load(FAMILY, "W8A16"), load(tmp_path / "w8"))
    expected = quantize(model, "W8A16")
    assert_same(expected, load(tmp_path / "w8", template=abstract(model)))
    assert_same(expected, load(tmp_path / "float", "W8A16", template=abstract(model)))
    assert_same(load(FAMILY, "W8A16"), load(tmp_path / "float", "W8A16"))


def test_what_would_not_load_again_is_refused_at_save(tmp_path):
    model = load(FAMILY)
    model.layers[0].mlp.down_proj = nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(0))
    save(model, tmp_path / "same")  # another class, the same tensor
    assert_same(model, load(tmp_path / "same"))
    model.layers[0].mlp.down_proj = nnx.Dropout(0.1)
    with pytest.raises(CheckpointError, match=r"has no layers\.0\.mlp\.down_proj\.kernel, which"):
        save(model, tmp_path / "out")
    model.layers[0].mlp.down_proj = nnx.Dict(
        a=nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(0)),
        b=nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(0)),
    )
    with pytest.raises(CheckpointError, match=r"both could be the model's layers\.0\.mlp\.down"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
