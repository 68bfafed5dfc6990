"""FastDeploy's quantization configurations, read as recipes and written from them."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import CacheSpec
from tests.fastdeploy_configs import WINT2
from tests.schemes.parameters import moe_params

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
