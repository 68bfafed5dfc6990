"""Weights in kernels' layouts over devices: each device prepares what it has."""

import jax
import numpy as np
import pytest

import fdq
from fdq.ops.prepared_weight import WordsWeight
from fdq.sharding import make_mesh, prepare
from tests.sharding.many_devices import model_of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_prepared_weights_on_two_devices(name, monkeypatch):
    """The words are undone bit for bit, and a step is that of one device."""
    monkeypatch.setenv("FDQ_IMPLEMENTATION", "mosaic_gpu")
    one = model_of(name, "W4A16C8")
    many = fdq.shard(one, make_mesh({"tensor": 2}))
    with pytest.raises(ValueError, match="the model is on a mesh"):
        fdq.prepare(many)
    prepare(many)
    assert isinstance(many.layers[0].self_attn.qkv_proj.kernel, WordsWeight)
    back = fdq.unshard(many)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    found = []
    for model in (many, one):
        fns = fdq.functional(model)
        state = fdq.prefill(model, [[3]], model.init_cache(1, 16))
        found.append(np.asarray(jax.jit(fns.step)(fns.params, state)[0]))
        monkeypatch.delenv("FDQ_IMPLEMENTATION", raising=False)
        jax.clear_caches()
    np.testing.assert_allclose(*found, rtol=0, atol=1e-4)
