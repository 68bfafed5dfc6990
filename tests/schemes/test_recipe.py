import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdq.schemes import path_pattern
from fdq.schemes.recipe import Recipe, Rule
from fdq.schemes.scheme import CacheSpec, Scheme
from tests.fastdeploy_configs import WINT2


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def moe_params(layers=3, dense_layers=1):
    """Shapes of an ERNIE-4.5-MoE, under fdq's own names."""

    def layer(index):
        mlp = {
            "gate_up_proj": {"kernel": struct(128, 512)},
            "down_proj": {"kernel": struct(256, 128)},
        }
        if index >= dense_layers:
            mlp = {
                "router": {"kernel": struct(128, 4, dtype=jnp.float32)},
                "experts": {
                    "gate_up_proj": {"kernel": struct(4, 128, 256)},
                    "down_proj": {"kernel": struct(4, 128, 128)},
                },
                "shared_experts": mlp,
            }
        return {
            "input_layernorm": {"scale": struct(128)},
            "self_attn": {
                "qkv_proj": {"kernel": struct(128, 256)},
                "o_proj": {"kernel": struct(128, 128)},
            },
            "mlp": mlp,
        }

    return {
        "embed_tokens": {"embedding": struct(512, 128)},
        "layers": [layer(i) for i in range(layers)],
        "norm": {"scale": struct(128)},
        "lm_head": {"kernel": struct(128, 512)},
    }


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


# --- FastDeploy ----------------------------------------------------------------------------------

W4A8C8 = {
    "quantization": "mix_quant",
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4a8",
    "kv_cache_quant_type": "int8",
    "is_quantized": True,
    "hadamard_block_size": 128,
}
FP8 = {
    "dense_quant_type": "block_wise_fp8",
    "moe_quant_type": "block_wise_fp8",
    "kv_cache_quant_type": "float8_e4m3fn",
    "quantization": "mix_quant",
}
W4AFP8 = {
    "quantization": "mix_quant",
    "dense_quant_type": "block_wise_fp8",
    "moe_quant_type": "w4afp8",
    "hadamard_block_size": 512,
}
OFFLINE = {"is_moe_quantized": True, "is_permuted": False}


def test_mix_quant_of_a_quantized_checkpoint():
    recipe = Recipe.from_fastdeploy(W4A8C8, num_layers=54)
    assert str(recipe.scheme_for("layers.3.mlp.experts.down_proj.kernel")) == (
        "W4A8C16-channel-static"
    )
    assert str(recipe.scheme_for("layers.3.mlp.shared_experts.down_proj.kernel")) == "W8A16C16"
    assert str(recipe.scheme_for("layers.3.self_attn.qkv_proj.kernel")) == "W8A16C16"
    assert recipe.scheme_for("lm_head.kernel") is None
    assert recipe.cache == CacheSpec(format="int8", granularity="channel", dynamic=False)
    assert recipe.record["hadamard_block_size"] == 128
    dynamic = Recipe.from_fastdeploy({**W4A8C8, "moe_dynamic_quant": True})
    assert str(dynamic.scheme_for("layers.3.mlp.experts.down_proj.kernel")) == "W4A8C16-channel"
    Recipe.parse(W4A8C8).table(moe_params(dense_layers=9))  # a dense model has no experts


def test_wint2_layer_ranges():
    recipe = Recipe.parse({"quantization_config": WINT2, "hidden_size": 1})
    for layer, scheme in ((3, "W4A16C16-channel"), (6, "W4A16C16-channel"), (7, "WCC2A16C16")):
        path = f"layers.{layer}.mlp.experts.down_proj.kernel"
        assert str(recipe.scheme_for(path)) == scheme
    assert str(recipe.scheme_for("layers.0.mlp.down_proj.kernel")) == "W8A16C16"
    Recipe.from_fastdeploy(WINT2, num_layers=54)
    for layers in (28, 60):
        with pytest.raises(ValueError, match=f"end at layer {layers - 1}, the last one"):
            Recipe.from_fastdeploy(WINT2, num_layers=layers)
    with pytest.raises(ValueError, match="matches nothing"):
        recipe.table(moe_params(layers=3))


@st.composite
def configs(draw):
    flags = st.fixed_dictionaries(
        {},
        optional={
            "is_quantized": st.booleans(),
            "is_moe_quantized": st.booleans(),
            "is_permuted": st.booleans(),
            "moe_dynamic_quant": st.booleans(),
            "is_channel_wise": st.booleans(),
            "hadamard_block_size": st.sampled_from([32, 128, 512]),
        },
    )
    cache = [None, "int8", "float8_e4m3fn", "block_wise_fp8", "int4_zp"]
    dense = ["wint8", "wint4", "block_wise_fp8", "tensor_wise_fp8", "wfp8afp8", "w8a8", "w4afp8"]
    experts = [*dense, "w4a8", "mxfp4", "wint2"]
    experts.remove("w8a8")
    kind = draw(st.sampled_from(["mix_quant", "wint2", "single"]))
    config = draw(flags)
    if kind == "single":
        config["quantization"] = draw(st.sampled_from(dense))
    elif kind == "mix_quant":
        config["quantization"] = kind
        config["dense_quant_type"] = draw(st.sampled_from(dense))
        config["moe_quant_type"] = draw(st.sampled_from(experts))
    else:
        low, high = draw(st.integers(0, 20)), draw(st.integers(21, 60))
        config = json.loads(json.dumps(WINT2)) | config
        config["dense_quant_type"] = draw(st.sampled_from(dense))
        config["moe_quant_config"]["moe_w4_quant_config"]["quant_end_layer"] = low
        config["moe_quant_config"]["moe_w2_quant_config"]["quant_start_layer"] = low + 1
        config["moe_quant_config"]["moe_w2_quant_config"]["quant_end_layer"] = high
    if draw(st.booleans()):
        config["kv_cache_quant_type"] = draw(st.sampled_from(cache))
    return config


@hypothesis.given(configs())
@hypothesis.example(W4A8C8)
@hypothesis.example(FP8)
@hypothesis.example(W4AFP8)
@hypothesis.example({**W4AFP8, **OFFLINE, "moe_dynamic_quant": True})
@hypothesis.example(WINT2)
@hypothesis.example({"quantization": "mix_quant", "kv_cache_quant_type": "block_wise_fp8"})
@hypothesis.settings(deadline=None)
def test_fastdeploy_configs_round_trip(config):
    recipe = Recipe.from_fastdeploy(config)
    assert recipe.to_fastdeploy() == config
    assert Recipe.from_json(recipe.to_json()).to_fastdeploy() == config


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        (Recipe.parse("W8A16C16"), {"quantization": "wint8"}),
        (Recipe.parse("wint4", compat="fastdeploy", has_experts=False), {"quantization": "wint4"}),
        (
            Recipe.parse("wint4", compat="fastdeploy"),
            {
                "quantization": "mix_quant",
                "dense_quant_type": "wint8",
                "moe_quant_type": "wint4",
            },
        ),
        (
            Recipe([("*.experts", "W4A8-channel-static")], "W8A16C8-kvchannel"),
            {
                "quantization": "mix_quant",
                "dense_quant_type": "wint8",
                "moe_quant_type": "w4a8",
                "kv_cache_quant_type": "int8",
                "is_quantized": True,
            },
        ),
    ],
)
def test_recipes_made_by_hand_become_configs(recipe, config):
    assert recipe.to_fastdeploy() == config


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.parse("W4A16C16"),
        Recipe.parse("W8A16C8"),
        Recipe([("layers.0", None)], "W8A16"),
        Recipe([("*.experts", "WNF4")], "W8A16"),
        Recipe(),
    ],
)
def test_recipes_that_fastdeploy_cannot_express(recipe):
    with pytest.raises(ValueError, match="FastDeploy has no quantization_config for the recipe"):
        recipe.to_fastdeploy()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**W4A8C8, "dense_quant_typ": "wint8"}, "unknown key 'dense_quant_typ'. Did you mean"),
        ({**W4A8C8, "foo": 1}, "unknown key 'foo'. Known are"),
        ({**W4A8C8, "dense_quant_type": "wint5"}, "unknown dense_quant_type 'wint5'. Did you mean"),
        ({**W4A8C8, "dense_quant_type": "w4a8"}, "for experts only"),
        ({**W4A8C8, "moe_quant_type": ["w4a8"]}, "expected a name"),
        ({**W4A8C8, "kv_cache_quant_type": {}}, "expected a name"),
        ({**W4A8C8, "kv_cache_quant_type": "int3"}, "unknown kv_cache_quant_type 'int3'"),
        ({**W4A8C8, "is_quantized": 1}, "is_quantized is 1; expected a bool"),
        ({**W4A8C8, "hadamard_block_size": 100}, "no power of two"),
        ({**W4A8C8, "moe_quant_config": {}}, "has no place in 'mix_quant'"),
        ({**W4A8C8, "moe_quant_config": {"a": 1}}, "has no place in 'mix_quant'"),
        ({"quantization": "mix_quant"}, "expected one of dense_quant_type"),
        ({"dense_quant_type": "wint8"}, "the key 'quantization' is missing"),
        ({"quantization": "wint9"}, "unknown quantization 'wint9'"),
        ({"quantization": "mix_qaunt"}, "Did you mean 'mix_quant'"),
        ("quantization.json", "json.load"),
        ({"quantization": "wint8", "moe_quant_type": "wint4"}, "has no place in 'wint8'"),
        ({**WINT2, "moe_quant_type": "wint2"}, "goes with moe_quant_type 'w4w2'"),
        ({**WINT2, "moe_quant_config": {}}, "needs moe_quant_config with the keys"),
    ],
)
def test_bad_fastdeploy_configs(config, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_fastdeploy(config)


@pytest.mark.parametrize("wrap", [dict, lambda c: {"quantization_config": c}, json.dumps])
def test_a_config_of_hugging_face_is_no_recipe(wrap):
    with pytest.raises(ValueError, match="quant_method='fp8' is .* Hugging Face.*'Wfp8Afp8'"):
        Recipe.parse(wrap({"quant_method": "fp8", "weight_block_size": [128, 128]}))
    with pytest.raises(ValueError, match="expected a JSON object, found None"):
        Recipe.parse({"quantization_config": None})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("moe_w2_quant_config", {"quant_start_layer": 8}, "without a gap"),
        ("moe_w2_quant_config", {"quant_start_layer": 6}, "without a gap"),
        ("moe_w4_quant_config", {"quant_start_layer": 7}, "without a gap"),
        ("moe_w4_quant_config", {"quant_start_layer": -1}, "layers -1..6"),
        ("moe_w2_quant_config", {"quant_group_size": 128}, "fdq knows"),
        ("moe_w4_quant_config", {"quant_granularity": "per_group"}, "fdq knows"),
        ("moe_w4_quant_config", {"extra": 1}, "needs exactly"),
    ],
)
def test_bad_wint2_ranges(part, change, message):
    config = json.loads(json.dumps(WINT2))
    config["moe_quant_config"][part] |= change
    with pytest.raises(ValueError, match=message):
        Recipe.from_fastdeploy(config)


@pytest.mark.parametrize(
    "change",
    [
        {"image_moe_quant_type": "wint4"},
        {"kv_cache_quant_type": "int8_zp"},
        {"has_zero_point": True},
        {"moe_quant_type": "wfp4afp8"},
    ],
)
def test_what_fdq_has_not(change):
    with pytest.raises(NotImplementedError):
        Recipe.from_fastdeploy({**W4A8C8, **change})


EXPERT, DENSE = "layers.9.mlp.experts.down_proj.kernel", "layers.9.self_attn.o_proj.kernel"


@pytest.mark.parametrize(
    ("name", "compat", "has_experts", "experts", "dense"),
    [
        ("wint4", None, True, "W4A16C16", "W4A16C16"),
        ("wint4", "fastdeploy", True, "W4A16C16-channel", "W8A16C16"),
        ("wint4", "fastdeploy", False, "W4A16C16-channel", "W4A16C16-channel"),
        ("w4afp8", "fastdeploy", True, "W4Afp8C16", "Wfp8Afp8C16-b128"),
        ("w4afp8", None, True, "W4Afp8C16", "W4Afp8C16"),
        ("wint2", None, True, "WCC2A16C16", "WCC2A16C16"),
        ("wint2", "fastdeploy", True, "WCC2A16C16", "W8A16C16"),
        ("wint8", "fastdeploy", True, "W8A16C16", "W8A16C16"),
        ("Mix_Quant", None, True, "W4A8C16", "W8A16C16"),
        ("mix_quant", "fastdeploy", True, "W4A8C16-channel", "W8A16C16"),
    ],
)
def test_names_as_fastdeploys_command_line_reads_them(name, compat, has_experts, experts, dense):
    recipe = Recipe.parse(name, compat=compat, has_experts=has_experts)
    assert str(recipe.scheme_for(EXPERT)) == experts
    assert str(recipe.scheme_for(DENSE)) == dense
    assert recipe.scheme_for("layers.9.mlp.router.kernel") is None
    assert (recipe.cache is not None) == (name.lower() == "mix_quant")


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
