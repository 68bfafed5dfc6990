"""A decode step is exported once, for any batch, and run where the model is not."""

import jax
import jax.export
import numpy as np
import pytest

import fdq
from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import functional
from fdq.decoding.loop import prefill
from fdq.nn.parameters import bind, split
from tests.covering import longest, slow
from tests.models import oracles


def of_any_batch(state):
    """The shapes of a state of b sequences, its static scales as they are."""
    (b,) = jax.export.symbolic_shape("b")

    def shape(path, array):
        name = jax.tree_util.keystr(path)
        lead = array.shape[:1] if "scale" in name and array.ndim == 2 else (b,)
        return jax.ShapeDtypeStruct((*lead, *array.shape[1:]), array.dtype)

    return jax.tree_util.tree_map_with_path(shape, state)


@pytest.mark.parametrize(
    ("scheme", "format"), [slow("W4A16-g32", "C8"), longest("W8A8", "C8-kvchannel")]
)
def test_a_step_is_exported_for_any_batch(scheme, format):
    model = oracles.oracle("qwen3")[0]
    prompts = np.random.default_rng(0).integers(0, 96, (3, 5))
    static = format == "C8-kvchannel"
    scales = fdq.calibrate(model, prompts).cache_scales(format) if static else None
    model = fdq.quantize(model, scheme)
    fns = functional(model)

    def step(params, state):
        logits, state = fns.step(params, state)
        return logits, state.push(logits.argmax(-1))

    def start(batch):
        cache = KVCache.init(model.config, batch, 16, format, scales=scales)
        return prefill(model, prompts[:batch], cache)

    exported = jax.export.export(jax.jit(step))(fns.params, of_any_batch(start(2)))
    restored = jax.export.deserialize(exported.serialize())
    for batch in (1, 3):
        logits, state = restored.call(fns.params, start(batch))
        assert isinstance(state, fdq.DecodeState) and isinstance(state.cache, KVCache)
        expected, like = jax.jit(step)(fns.params, start(batch))
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        assert jax.tree.structure(state) == jax.tree.structure(like)
        assert (state.tokens == like.tokens).all()


@pytest.mark.parametrize("scheme", [slow(None), longest("W4A16-g32")])
def test_a_forward_pass_is_exported_for_any_batch_and_length(scheme):
    model = oracles.oracle("llama")[0]
    model = model if scheme is None else fdq.quantize(model, scheme)
    template, params = split(model)
    b, t = jax.export.symbolic_shape("b, t")
    forward = jax.jit(lambda params, tokens: bind(template, params)(tokens))
    exported = jax.export.export(forward)(params, jax.ShapeDtypeStruct((b, t), np.int32))
    restored = jax.export.deserialize(exported.serialize())
    for shape in ((1, 3), (2, 9)):
        tokens = np.random.default_rng(0).integers(0, 96, shape).astype(np.int32)
        np.testing.assert_allclose(restored.call(params, tokens), model(tokens), atol=1e-4)


def test_sampling_is_an_argument_of_what_is_exported():
    sampling = fdq.Sampling(temperature=0.5, top_k=3)
    exported = jax.export.export(jax.jit(lambda s, x: x * s.temperature))(sampling, 4.0)
    assert jax.export.deserialize(exported.serialize()).call(sampling, 4.0) == 2.0
