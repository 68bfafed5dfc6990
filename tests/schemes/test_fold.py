"""Kernels of plain trees whose contracted axes are not the last but one."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import QTensor
from fdq.quantizers.assigned import Assigned
from fdq.quantizers.layer_inputs import LayerInputs
from fdq.schemes.fold import Fold
from fdq.schemes.recipe import Recipe


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("shape", "contract", "stacked", "folded"),
    [
        ((8, 6), (1,), 0, (6, 8)),
        ((8, 6), (-2,), 0, (8, 6)),
        ((8, 4, 2), (0,), 0, (8, 8)),
        ((4, 2, 8), (0, 1), 0, (8, 8)),
        ((3, 8, 4, 2), (1,), 1, (3, 8, 8)),
        ((3, 5, 4), (2,), 1, (3, 4, 5)),
        ((3, 3, 5, 4), (0, 1, 2), 0, (45, 4)),
    ],
)
def test_a_fold_and_back(shape, contract, stacked, folded, rng):
    fold, kernel = Fold.of(len(shape), contract, stacked), normal(rng, *shape)
    matrix = fold(kernel)
    assert matrix.shape == fold.shape(shape) == folded
    np.testing.assert_array_equal(fold.unfolded(matrix, shape[stacked:]), kernel)
    assert fold(jax.ShapeDtypeStruct(shape, jnp.float32)).shape == folded


def test_weights_of_torch_and_equinox_are_grouped_along_their_second_axis(rng):
    w = normal(rng, 24, 64) * jnp.asarray(np.exp2(np.arange(64)[None] // 32 * 8), jnp.float32)
    rule = ("*.weight", "W4A16-g32", {"contract": 1})
    q = fdq.quantize({"layer": {"weight": w}}, [rule])["layer"]["weight"]
    expected = fdq.quantize(w.T, "W4A16-g32")
    assert isinstance(q, FoldedWeight) and q.shape == w.shape and q.T is q.q
    np.testing.assert_array_equal(q.dequantize(), fdq.dequantize(expected).T)
    x = normal(rng, 64, 3)
    for rows in (x, x[:, 0]):
        np.testing.assert_allclose(q @ rows, q.dequantize() @ rows, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(rows.T @ q.T, (q @ rows).T, rtol=1e-6)
    assert jax.jit(lambda q: q.dequantize(jnp.bfloat16))(q).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="contracted axes are others"):
        _ = x.T @ q
    again = fdq.match_table({"layer": {"weight": q}, "w": w}, "W8")
    assert "is quantized" in again.left[0].reason and again.quantized[0].path == "w"
    abstract = jax.eval_shape(lambda w: fdq.quantize({"a": {"weight": w}}, [rule]), w)
    assert abstract["a"]["weight"].dequantize().shape == w.shape


@pytest.mark.parametrize("scheme", ["W8", [("layer.weight", "W8")]])
def test_a_weight_of_unknown_axes_is_listed_or_refused(scheme, rng):
    tree = {"layer": {"weight": normal(rng, 24, 64)}, "head": {"kernel": normal(rng, 64, 8)}}
    if scheme == "W8":
        table = fdq.match_table(tree, scheme)
        assert [row.path for row in table.quantized] == ["head.kernel"]
        assert "needs a rule with contract=" in table.summary()
    else:
        message = r"layer\.weight \[24, 64\]: .*torch and Equinox.*dict\(contract=1\)"
        with pytest.raises(ValueError, match=message):
            fdq.quantize(tree, scheme)


@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_kernels_of_linen_know_their_axes(use_bias, rng):
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return flax.linen.MultiHeadDotProductAttention(4, use_bias=use_bias)(x, x)

    x = normal(rng, 2, 5, 64)
    params = Net().init(jax.random.key(0), x)
    q = fdq.quantize(params, [("*.{query,key,value,out}", "W8A16")])
    held = q["params"]["MultiHeadDotProductAttention_0"]
    for name, shape in (("query", (64, 4, 16)), ("out", (4, 16, 64))):
        assert held[name]["kernel"].shape == shape
        assert held[name]["kernel"].q.shape == (64, 64) and held[name]["kernel"].q.scale.size == 64
    expected = Net().apply(params, x)
    found = fdq.linen.apply(Net(), q, x)
    assert 0 < np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_a_kernel_that_would_be_many_matrices_of_few_rows_is_refused(rng):
    tree = {"qkv": {"kernel": normal(rng, 128, 4, 32)}}
    with pytest.raises(ValueError, match=r"128 matrices \[4, 32\]\?.*contract=0 .*\[D, H, d\]"):
        fdq.quantize(tree, [("qkv", "W8")])
    q = fdq.quantize(tree, [("qkv", "W8", {"contract": 0})])["qkv"]["kernel"]
    assert q.q.shape == (128, 128)
    stacked = fdq.quantize(tree, [("qkv", "W8", {"contract": 1, "stacked": 1})])["qkv"]["kernel"]
    assert isinstance(stacked, QTensor) and stacked.shape == (128, 4, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contract": 2}, r"contract=\(2,\) and stacked=0 do not fit 2 axes"),
        ({"contract": (0, 1)}, "at least one is left"),
        ({"contract": (0, 0)}, "each contracted axis is there once"),
        ({"contract": 0, "stacked": 1}, "after the stacked ones"),
        ({"contract": "in"}, "expected the axes that are contracted"),
        ({"contract": True}, "expected the axes"),
        ({"stacked": 1}, "expected the axes"),
        ({"contracts": 1}, "A rule is a pair"),
    ],
)
def test_wrong_axes(options, message, rng):
    with pytest.raises(ValueError, match=message):
        fdq.quantize({"a": {"weight": normal(rng, 64, 8)}}, [("a", "W8", options)])


def test_axes_of_rules_survive_as_json_and_as_text():
    rules = [("a", "W8", {"contract": (0, 1)}), ("b", "W4", {"contract": 1, "stacked": 1})]
    recipe = Recipe(rules)
    assert Recipe.from_json(recipe.to_json()) == Recipe.parse(str(recipe)) == recipe
    with pytest.raises(ValueError, match="cannot say contract"):
        recipe.to_fastdeploy()
    with pytest.raises(ValueError, match="'\\*' has no contract"):
        Recipe([("*", "W8", {"contract": 1})])


def test_activations_that_a_tree_drops_are_said(rng, caplog, capsys):
    tree = {"a": {"kernel": normal(rng, 64, 8)}}
    with caplog.at_level("WARNING", "fdq"):
        fdq.quantize(tree, "W8A16")
        assert not caplog.text
        fdq.quantize(tree, "W8A8")
    assert "activations (A8) are not quantized" in caplog.text
    fdq.quantize(tree, "W8A8", verbose=True)
    assert "activations (A8) are not quantized" in capsys.readouterr().out


def test_tensors_of_a_stream_are_folded(rng):
    tree = {"a": {"weight": normal(rng, 8, 64)}}
    assigned = Assigned.of(tree, [("a", "W8", {"contract": 1})])
    row, paths = assigned.rows["a.weight"]
    found = assigned.tensor(tree["a"]["weight"], row, paths, inputs=LayerInputs())
    assert isinstance(found, FoldedWeight) and found.shape == (8, 64) and found.T.shape == (64, 8)
