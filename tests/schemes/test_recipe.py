import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from flax import nnx

from fdq.schemes import path_pattern
from fdq.schemes.recipe import Recipe, Rule
from fdq.schemes.scheme import CacheSpec, Scheme
from tests.schemes.parameters import moe_params, struct


def schemes_by_path(recipe, params):
    return {row.path: str(row.scheme) for row in recipe.table(params).quantized}


# --- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "reach"),
    [
        ("layers.0.mlp.kernel", "layers.0.mlp.kernel", "leaf"),
        ("layers.0.mlp", "layers.0.mlp.kernel", "module"),
        ("layers.0", "layers.0.mlp.kernel", "ancestor"),
        ("layers.0", "layers.01.mlp.kernel", None),
        ("layers.1", "layers.10.mlp.kernel", None),
        ("*.experts", "layers.1.mlp.experts.down_proj.kernel", "ancestor"),
        ("*.experts", "layers.1.mlp.shared_experts.down_proj.kernel", None),
        ("layers.{0..6}.mlp", "layers.6.mlp.kernel", "module"),
        ("layers.{0..6}.mlp", "layers.7.mlp.kernel", None),
        ("layers.{0..6}.mlp", "layers.16.mlp.kernel", None),
        ("layers.[!0-3].mlp", "layers.4.mlp.kernel", "module"),
        ("layers.[0-3].mlp", "layers.4.mlp.kernel", None),
        ("*.{q,k}_proj", "a.k_proj.kernel", "module"),
        ("*.{q,k}_proj", "a.v_proj.kernel", None),
        ("*.?_proj", "a.v_proj.kernel", "module"),
        ("a.b", "a+b.kernel", None),
    ],
)
def test_patterns(pattern, path, reach):
    assert path_pattern.reach(pattern, path) == reach


@pytest.mark.parametrize("pattern", ["", " ", "layers.{3..1}", "layers.{0", "a[", "a[]", 3])
def test_bad_patterns(pattern):
    with pytest.raises(ValueError, match=r"pattern|Pattern"):
        Rule(pattern, None)


# --- matching ------------------------------------------------------------------------------------

PROTECTED = (
    "embed_tokens.embedding",
    "layers.1.mlp.router.kernel",
    "layers.1.mlp.router.correction_bias",
    "layers.1.input_layernorm.scale",
    "layers.1.self_attn.q_norm.scale",
    "norm.scale",
    "lm_head.kernel",
)


@pytest.mark.parametrize("path", PROTECTED)
@pytest.mark.parametrize("rules", [[], [("layers.*", "W4A16")], [("layers.1", "W4A16")]])
def test_protected_tensors_stay_unless_a_rule_names_them(path, rules):
    recipe = Recipe(rules, "W8A16")
    assert recipe.scheme_for(path) is None
    assert "left unless a rule's pattern contains" in recipe.match(path).reason
    assert Recipe([(path, "W4A16")], "W8A16").scheme_for(path) == Scheme.parse("W4A16")


def test_first_match_wins_and_the_rest_gets_the_default():
    recipe = Recipe([("layers.0", None), ("*.down_proj", "W8A8"), ("*", "W4A16C8")])
    assert recipe.scheme_for("layers.0.mlp.down_proj.kernel") is None
    assert recipe.scheme_for("layers.1.mlp.down_proj.kernel") == Scheme.parse("W8A8")
    assert recipe.scheme_for("layers.1.mlp.gate_up_proj.kernel") == Scheme.parse("W4A16")
    assert recipe.cache == CacheSpec.parse("C8")
    assert recipe == Recipe.parse({"layers.0": None, "*.down_proj": "W8A8", "*": "W4A16C8"})
    assert recipe == eval("Recipe([('layers.0', None), ('*.down_proj', 'W8A8')], 'W4A16C8')")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe([("*", "W4"), ("lm_head", "W8")]), "'lm_head' comes after '\\*'"),
        (lambda: Recipe([("a", "W4"), ("a", "W8")]), "Two rules for 'a'"),
        (lambda: Recipe([("*", "W4")], "W8"), "Two defaults"),
        (lambda: Recipe([("*", "W4C8")], cache="Cfp8"), "Two cache formats"),
        (lambda: Recipe([("a", "W4A16C8")]), "one cache for the whole model"),
        (lambda: Recipe([("a", "W5A16")]), "Did you mean"),
        (lambda: Recipe.parse("{not json"), "not valid JSON"),
        (lambda: Recipe.from_json('{"rules": [], "extra": 1}'), "unknown: \\['extra'\\]"),
        (lambda: Recipe.from_json('{"default": null}'), "missing: \\['rules'\\]"),
        (lambda: Recipe.from_json('{"rules": [{"pattern": "a"}]}'), "missing: \\['scheme'\\]"),
        (lambda: Recipe.from_json('{"rules": [3]}'), "A rule is a JSON object"),
        (lambda: Recipe(["W4"]), "A rule is a pair.*got 'W4'"),
        (lambda: Recipe([("a", "W4", "W8")]), "A rule is a pair"),
    ],
)
def test_contradictory_recipes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parse_takes_whatever_names_a_recipe():
    w4 = Recipe.parse("W4A16C8")
    assert w4 == Recipe.parse(Scheme.parse("W4A16C8")) == Recipe.parse(w4)
    assert w4 == Recipe.parse({"*": "W4A16C8"}) == Recipe.parse([("*", "W4A16C8")])
    assert w4 == Recipe.parse(json.dumps({"*": "W4A16C8"})) == Recipe.parse(w4.to_json())
    assert str(w4) == "W4A16C8" and hash(w4) == hash(Recipe.parse(str(w4)))
    assert Recipe.parse(None).default is None
    assert Recipe.parse("W16A16C8") == Recipe(cache="C8")
    with pytest.raises(TypeError, match="got ndarray"):
        Recipe.parse(np.zeros((8, 8)))
    with pytest.raises(TypeError, match="got int"):
        Recipe.parse(4)


PATTERNS = st.sampled_from(["layers.0", "*.experts", "layers.{0..6}.mlp", "lm_head", "*.q", "a?"])
NAMES = st.sampled_from([None, "W4A16", "W8A8", "W4Afp8-g64-static", "WNF4-dq", "wint2", "W16"])


@hypothesis.given(
    st.lists(st.tuples(PATTERNS, NAMES), max_size=4, unique_by=lambda pair: pair[0]),
    NAMES,
    st.sampled_from([None, "C8", "Cfp8-kvhead", "C4", "C16"]),
    st.dictionaries(st.sampled_from(["is_quantized", "hadamard_block_size"]), st.integers()),
)
@hypothesis.settings(deadline=None)
def test_json_round_trip(rules, default, cache, record):
    recipe = Recipe(rules, default, cache=cache, record=record)
    restored = Recipe.from_json(recipe.to_json())
    assert restored == recipe and restored.record == recipe.record
    assert Recipe.from_json(json.loads(recipe.to_json())) == recipe
    assert Recipe.parse(str(recipe)) == recipe


# --- the table -----------------------------------------------------------------------------------


def test_table_of_a_mixture_of_experts():
    table = Recipe.parse("W4A16C8").table(moe_params())
    paths = {row.path for row in table.quantized}
    assert "layers.1.mlp.experts.down_proj.kernel" in paths
    assert "layers.1.mlp.shared_experts.down_proj.kernel" in paths
    assert {row.path for row in table.left} == {
        "embed_tokens.embedding",
        "norm.scale",
        "lm_head.kernel",
        *(f"layers.{i}.input_layernorm.scale" for i in range(3)),
        *(f"layers.{i}.mlp.router.kernel" for i in (1, 2)),
    }
    experts = next(row for row in table.rows if "experts.gate_up" in row.path)
    assert experts.nbytes == 4 * 128 * 256 * 2
    assert experts.nbytes_after == 4 * (128 * 256 // 2 + 256 * 2)
    text = str(table)
    assert "layers.{1..2}.mlp.experts.gate_up_proj.kernel" in text and "W4A16C16" in text
    assert len({line.index("bfloat16") for line in text.splitlines() if "bfloat16" in line}) == 1
    assert "router: left unless" in table.summary() and "experts" not in table.summary()


def test_only_matrices_named_like_weights_unless_a_rule_names_others():
    params = {
        "a": {"kernel": struct(128, 8), "bias": struct(8)},
        "b": {
            "weight": struct(128, 8),
            "table": struct(128, 8),
            "index": struct(8, 8, dtype="int8"),
        },
        "conv": {"kernel": struct(3, 128, 8)},
        "w": struct(128, 8),
        "note": "text",
    }
    table = Recipe.parse("W8").table(params)
    assert {row.path for row in table.quantized} == {"a.kernel", "w"}
    reasons = {row.path: row.reason for row in table.left}
    assert reasons["conv.kernel"] == "3-D: needs a rule that names it, read as [..., K, N]"
    assert reasons["b.table"].startswith("not named kernel, w")
    assert reasons["b.weight"].startswith("named weight: may be [in, out], or [out, in]")
    assert reasons["b.index"] == "dtype int8"
    assert reasons["a.bias"] == "vector"
    assert reasons["note"] == "str, not an array"
    for pattern in ("conv", "conv.kernel", "c*v"):
        assert "conv.kernel" in schemes_by_path(Recipe([(pattern, "W4"), ("*", "W8")]), params)
    assert "b.table" in schemes_by_path(Recipe([("*.table", "W4")]), params)
    oriented = Recipe([("b.weight", "W4", {"contract": 0})])
    assert set(schemes_by_path(oriented, params)) == {"b.weight"}


def test_state_and_linen_paths():
    query = {"kernel": struct(64, 4, 16), "bias": struct(4, 16)}
    table = Recipe([("*.query", "W8")]).table({"mha": {"query": query}})
    assert [row.path for row in table.quantized] == ["mha.query.kernel"]
    assert [row.reason for row in table.left] == ["bias"]
    state = nnx.eval_shape(lambda: nnx.state(nnx.Linear(128, 8, rngs=nnx.Rngs(0))))
    assert schemes_by_path(Recipe.parse("W8"), state) == {"kernel": "W8A16C16"}
    params = {"params": {"Dense_0": {"kernel": np.zeros((128, 8), np.float32)}}}
    assert schemes_by_path(Recipe([("Dense_0", "W8")]), params) == {"Dense_0.kernel": "W8A16C16"}
    with pytest.raises(TypeError, match=r"fdq\.match_table"):
        Recipe.parse("W8").table(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("layers.*.self_attn.q_proj", "W4")], "matches nothing. Nearest paths: .*qkv_proj"),
        ([("layers.7", "W4")], "matches nothing. Nearest paths: .*'layers.0"),
        ([("layers.9.*", None)], "matches nothing. Nearest"),
        ([("layers.*", "W8"), ("layers.0.mlp", "W4")], "goes to 'layers.\\*'.*narrower rule first"),
        ([("layers.*.mlp.rout*", "W4")], "left \\(router: left unless"),
        ([("*.input_layernorm", "W4")], "input_layernorm.scale is left \\(vector\\)"),
    ],
)
def test_rules_that_quantize_nothing_are_errors(rules, message):
    with pytest.raises(ValueError, match=message):
        Recipe(rules, "W8A16").table(moe_params())
    Recipe([Rule(p, s and Scheme.parse(s), required=False) for p, s in rules]).table(moe_params())


def test_shapes_that_do_not_fit():
    params = {"mlp": {"up": {"kernel": struct(96, 8)}}}
    with pytest.raises(ValueError, match=r"mlp.up.kernel: K=96 .*-g32.*\('mlp.up.kernel', None\)"):
        Recipe.parse("W4A16").table(params)
    assert Recipe.parse("W4A16-g32").table(params).quantized
    with pytest.raises(ValueError, match="Nothing to quantize"):
        Recipe.parse("W4A16").table({"bias": struct(8)})


# --- quantizers of rules --------------------------------------------------------------------------

WITH_QUANTIZERS = Recipe(
    [("*.down_proj", "W4A16", {"quantizer": "absmax"}), ("a", None), ("*", "W4A16C8")],
)
DEFAULT_QUANTIZER = Recipe([("b", "W8A16"), ("*", "W4A16", {"quantizer": "signed_max"})])


@pytest.mark.parametrize("recipe", [WITH_QUANTIZERS, DEFAULT_QUANTIZER], ids=["rule", "default"])
def test_quantizers_of_rules_survive_as_json_and_as_text(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.parse(str(recipe)) == recipe
    assert hash(Recipe.parse(str(recipe))) == hash(recipe)


def test_rules_name_quantizers():
    assert WITH_QUANTIZERS.match("layers.0.mlp.down_proj.kernel").quantizer == "absmax"
    assert WITH_QUANTIZERS.match("layers.0.mlp.up_proj.kernel").quantizer is None
    assert DEFAULT_QUANTIZER.match("layers.0.mlp.up_proj.kernel").quantizer == "signed_max"
    assert DEFAULT_QUANTIZER.match("b.kernel").quantizer is None
    assert "quantizer" not in Recipe.parse("W4A16").to_json()
    with pytest.raises(ValueError, match="cannot say quantizer='absmax'"):
        WITH_QUANTIZERS.to_fastdeploy()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("a", "W4A16", {"quantizer": "absmx"}), "Rule 'a': .*Did you mean 'absmax'"),
        (("a", None, {"quantizer": "absmax"}), "Rule 'a': .*no weight is quantized"),
        (("a", "W4A16", {"method": "absmax"}), r"may have dict\(quantizer=name\) after"),
        (("a", "W4A16", "absmax"), r"may have dict\(quantizer=name\) after"),
        (("*", "W16C8", {"quantizer": "absmax"}), "The default: .*no weight is quantized"),
        (("*", "W4A16", {"quantizer": "none"}), "The default: Unknown quantizer 'none'"),
    ],
)
def test_wrong_quantizers_of_rules(rule, message):
    with pytest.raises(ValueError, match=message):
        Recipe([rule])
