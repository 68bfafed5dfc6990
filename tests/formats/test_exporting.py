"""Functions of quantized weights are exported, serialized and restored by `jax.export`."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import QTensor

pytest.importorskip("flatbuffers", reason="jax.export serializes with it")


@pytest.mark.parametrize("name", ["W4A16-g32", "W3A16-channel-asym", "WNF4-dq", "WNVFP4"])
def test_a_function_of_quantized_weights_comes_back(name, rng):
    w = rng.standard_normal((128, 16)).astype(np.float32)
    rules = [("out", name), ("torch.weight", name, {"contract": 1}), ("*", name)]
    tree = {"kernel": w, "out": w, "torch": {"weight": np.ascontiguousarray(w.T)}}
    params = fdq.quantize(tree, rules)

    def function(params, x):
        y = x @ params["kernel"] + x @ params["torch"]["weight"].T
        return y, params

    x = jnp.asarray(rng.standard_normal((3, 128)), jnp.float32)
    exported = jax.export.export(jax.jit(function))(params, x)
    restored = jax.export.deserialize(bytearray(exported.serialize()))
    assert restored.in_tree == jax.tree.structure(((params, x), {}))
    found, expected = restored.call(params, x), function(params, x)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    back = found[1]
    assert isinstance(back["out"], QTensor) and back["out"].spec == params["out"].spec
    assert isinstance(back["torch"]["weight"], FoldedWeight)
    transposed = back["torch"]["weight"].dequantize().T
    np.testing.assert_array_equal(transposed, fdq.dequantize(back["out"]))


def test_a_symbolic_batch(rng):
    q = fdq.quantize(rng.standard_normal((128, 16)).astype(np.float32), "W4A16-g32")
    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), q)
    abstract = jax.ShapeDtypeStruct((b, 128), jnp.float32)
    exported = jax.export.export(jax.jit(fdq.matmul))(abstract, shapes)
    restored = jax.export.deserialize(bytearray(exported.serialize()))
    for m in (1, 5):
        x = jnp.asarray(rng.standard_normal((m, 128)), jnp.float32)
        np.testing.assert_allclose(restored.call(x, q), fdq.matmul(x, q), rtol=1e-5, atol=1e-5)
