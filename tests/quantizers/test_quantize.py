import flax.linen
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

from fdq.formats.qtensor import QTensor, dequantize
from fdq.quantizers import quantize_array
from fdq.quantizers.quantization import match_table, quantize
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import Scheme


def params(rng):
    def normal(*shape, dtype=np.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "embed": {"embedding": normal(32, 64)},
        "block": [{"mlp": {"kernel": normal(64, 32), "bias": normal(32)}}, {"w": normal(64, 8)}],
        "stack": {"kernel": normal(3, 64, 16)},
        "steps": jnp.zeros((), jnp.int32),
    }


def equal(q, expected):
    assert q.spec == expected.spec and q.padding == expected.padding
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(np.asarray(q.arrays()[name]), np.asarray(array))


def test_arrays(rng):
    w = rng.standard_normal((3, 64, 16)).astype(np.float32)
    for target in (w, jnp.asarray(w)):
        q = quantize(target, "W4A16-g32")
        equal(q, quantize_array(w, Scheme.parse("W4A16-g32").weight))
    assert q.shape == (3, 64, 16)
    abstract = quantize(jax.ShapeDtypeStruct(w.shape, w.dtype), "W4A16-g32")
    assert {k: (a.shape, a.dtype) for k, a in abstract.arrays().items()} == {
        k: (a.shape, a.dtype) for k, a in q.arrays().items()
    }
    traced = jax.jit(lambda w: quantize(w, "W4A16-g32"))(w)
    equal(traced, q)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W16A16C8", "One array takes one scheme with a weight format"),
        ({"a": "W4A16"}, "One array takes one scheme"),
        ("W4A16", "K=64 .*-g64"),
        ("W4A17", "Did you mean"),
    ],
)
def test_arrays_with_schemes_that_do_not_fit(scheme, message):
    with pytest.raises(ValueError, match=message):
        quantize(np.ones((64, 16), np.float32), scheme)


def test_variables_and_qtensors_are_refused():
    for target in (nnx.Param(jnp.ones((8, 8))), quantize(np.ones((8, 8), np.float32), "W8")):
        with pytest.raises(TypeError, match="pass the array, or the module"):
            quantize(target, "W8")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("path/to/model", "found 'path/to/model'. Checkpoints are read by fdq.load"),
        (flax.linen.Dense(8), r"of a Linen module: its params\).* found Dense"),
        (nnx.Linear, "an NNX module; found <class"),
        ({"a": [nnx.Linear(8, 8, rngs=nnx.Rngs(0))]}, r"a\.0: an NNX module .* inside a dict"),
    ],
)
def test_things_that_hold_no_arrays_are_refused(target, message):
    with pytest.raises(TypeError, match=message):
        quantize(target, "W8")


def test_trees(rng, capsys):
    tree = params(rng)
    q = quantize(tree, "W4A16-g32", verbose=True)
    printed = capsys.readouterr().out
    spec = Scheme.parse("W4A16-g32").weight
    equal(q["block"][0]["mlp"]["kernel"], quantize_array(tree["block"][0]["mlp"]["kernel"], spec))
    equal(q["block"][1]["w"], quantize_array(tree["block"][1]["w"], spec))
    for path in (("embed", "embedding"), ("stack", "kernel"), ("steps",)):
        a, b = tree, q
        for key in path:
            a, b = a[key], b[key]
        assert a is b
    assert printed.startswith("Quantized 2 of 6 tensors")
    for line in ("embed.embedding", "3-D: needs a rule that names it", "dtype int32", "vector"):
        assert line in printed
    q = quantize(tree, "W8", rules={"stack": "W4A16-g32", "*.embedding": "W8"})
    equal(q["stack"]["kernel"], quantize_array(tree["stack"]["kernel"], spec))
    assert q["embed"]["embedding"].spec.format == "int8"
    assert capsys.readouterr().out == ""
    table = match_table(tree, "W8", rules=[("stack", "W4A16-g32")])
    assert {row.path for row in table.quantized} == {
        "block.0.mlp.kernel",
        "block.1.w",
        "stack.kernel",
    }


def test_containers_keep_their_type(rng):
    tree = params(rng)
    assert type(quantize(freeze({"a": tree["block"][0]}), "W8")) is FrozenDict
    state = nnx.state(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    q = quantize(state, "W8")
    assert type(q) is nnx.State and isinstance(q["kernel"], QTensor)
    assert isinstance(q["bias"], nnx.Variable)


def test_abstract_trees_have_the_structure_of_concrete_ones(rng):
    tree = params(rng)
    shapes = jax.eval_shape(lambda: tree)
    abstract, concrete = (quantize(t, "WNF4A16-g32") for t in (shapes, tree))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    same = jax.tree.map(lambda s, a: (s.shape, s.dtype) == (a.shape, a.dtype), abstract, concrete)
    assert all(jax.tree.leaves(same))


def test_a_leaf_used_twice_is_quantized_once(rng):
    w = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
    q = quantize({"a": {"w": w}, "b": {"w": w}, "c": {"w": w}}, {"c": None, "*": "W8"})
    assert q["a"]["w"] is q["b"]["w"] and q["c"]["w"] is w


def test_donated_leaves_are_freed(rng):
    w, kept = (jnp.asarray(rng.standard_normal((16, 8)), jnp.float32) for _ in range(2))
    quantize({"a": {"w": w}, "b": {"w": kept}, "c": {"x": kept}}, "W8", donate=True)
    assert w.is_deleted() and not kept.is_deleted()
    w = jnp.ones((16, 8))
    quantize(w, "W8", donate=True)
    assert w.is_deleted()


@hypothesis.given(
    st.recursive(
        st.sampled_from([(64,), (64, 8), (2, 64, 8)]),
        lambda children: st.dictionaries(
            st.sampled_from(["kernel", "w", "bias", "router", "mlp", "x1"]), children, max_size=3
        ),
        max_leaves=6,
    )
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_any_tree_keeps_its_structure(shapes):
    def is_shape(x):
        return isinstance(x, tuple)

    tree = {"kernel": jax.ShapeDtypeStruct((64, 8), jnp.float32), "rest": shapes}
    tree = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32) if is_shape(s) else s, tree, is_leaf=is_shape
    )
    q = quantize(tree, "W8")
    rows = {row.path: row for row in Recipe.parse("W8").table(tree).rows}
    flat, _ = jax.tree_util.tree_flatten_with_path(q, is_leaf=lambda x: isinstance(x, QTensor))
    assert len(flat) == len(rows)
    for entries, leaf in flat:
        path = ".".join(entry.key for entry in entries)
        assert isinstance(leaf, QTensor) == (rows[path].scheme is not None)
        assert leaf.shape == rows[path].shape
        weight = len(leaf.shape) == 2 and entries[-1].key in ("kernel", "w")
        assert isinstance(leaf, QTensor) == (weight and "router" not in path)
        if isinstance(leaf, QTensor):
            assert leaf.nbytes == rows[path].nbytes_after


@pytest.mark.parametrize(
    ("name", "codes"),
    [("wint8", 127), ("wint4", 7), ("w4a8", 7), ("w4afp8", None), ("W4-asym", None)],
)
def test_fastdeploys_rounding_where_it_has_one(name, codes, rng):
    w = jnp.asarray(rng.standard_normal((128, 16)), jnp.bfloat16)
    q = quantize({"w": w}, name, compat="fastdeploy")["w"]
    if codes is None:
        equal(q, quantize_array(w, q.spec))
        return
    assert q.spec.granularity == "channel"
    equal(q, quantize_array(w, q.spec, compat="fastdeploy"))
    largest = np.abs(np.asarray(dequantize(q)) / np.asarray(q.scale, np.float32)).max(axis=0)
    np.testing.assert_allclose(largest, codes, rtol=1e-6)


def test_importance_guides_the_search(rng):
    w = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    importance = jnp.asarray(np.r_[np.full(8, 100.0), np.ones(56)], jnp.float32)
    spec = Scheme.parse("W4-g32").weight
    expected = quantize_array(w, spec, importance=importance)
    equal(quantize(w, "W4-g32", importance=importance), expected)
    tree = {"a": {"kernel": w}, "b": {"kernel": w}, "c": {"kernel": w}}
    by_path = {"a.kernel": importance, "b": importance}
    q = quantize(tree, {"c": "W8", "*": "W4-g32"}, importance=by_path)
    equal(q["a"]["kernel"], expected)
    equal(q["b"]["kernel"], expected)


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        ("tree", {"importance": np.ones(64)}, TypeError, "importance= is what .* got ndarray"),
        ("tree", {"importance": {"b": 1.0}}, ValueError, "importance: there is no tensor 'b'"),
        ("tree", {"calibration": {"a": 1.0}}, ValueError, "pass activation_scale= to fdq.matmul"),
        ("array", {"importance": {"a": 1.0}}, TypeError, r"of one array is an array \[K\]"),
    ],
)
def test_statistics_that_would_not_be_used_are_errors(target, options, error, message):
    w = np.ones((64, 16), np.float32)
    with pytest.raises(error, match=message):
        quantize({"a": {"kernel": w}} if target == "tree" else w, "W4-g32", **options)


def test_methods_reach_the_quantizer(rng):
    w = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
    spec = Scheme.parse("W4-g32").weight
    q = quantize({"w": w}, "W4-g32", method="absmax")["w"]
    equal(q, quantize_array(w, spec, method="absmax"))
    with pytest.raises(ValueError, match="no method 'magic'"):
        quantize({"w": w}, "W4-g32", method="magic")


@pytest.mark.parametrize(
    ("tree", "scheme", "options", "message"),
    [
        ({"bias": np.ones(8, np.float32)}, "W8", {}, "Nothing to quantize"),
        ({"w": np.ones((8, 8), np.float32)}, "W8", {"rules": {"v": "W4"}}, "Nearest paths: 'w'"),
        ({"w": np.ones((8, 8), np.float32)}, "W8", {"rules": {"*": "W4"}}, "no '\\*' and no cache"),
        ({"m": {"w": np.full((8, 8), np.nan, np.float32)}}, "W8", {}, r"m\.w: 64 of 64 values"),
        ({"w": np.ones((8, 8), np.float32)}, "W8", {"compat": "vllm"}, "use None or one of"),
    ],
)
def test_errors(tree, scheme, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(tree, scheme, **options)


@pytest.mark.parametrize(
    "again", ["W8A16", {"a.*": "W8A16", "*": "W4A16"}, {"b": None, "*": "W8A16"}], ids=str
)
def test_what_is_quantized_already_is_not_quantized_again(again):
    w = jnp.ones((128, 8))
    tree = quantize({"a": {"kernel": w}, "b": {"kernel": w}}, "W4A16")
    with pytest.raises(ValueError, match=r"quantized already: a\.kernel is quantized \(W4"):
        quantize(tree, again)


def test_what_a_first_recipe_left_may_be_quantized_by_a_second():
    w = jnp.ones((128, 8))
    tree = quantize({"a": {"kernel": w}, "b": {"kernel": w}}, {"b": None, "*": "W4A16"})
    both = quantize(tree, {"b": "W8A16"})
    assert (str(both["a"]["kernel"].spec), str(both["b"]["kernel"].spec)) == ("W4", "W8")
