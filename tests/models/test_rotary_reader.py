"""What a config says of rotary positions and windows: types, spellings, and which of two counts."""

import json

import pytest

from fdq import models
from fdq.models.config_reader import ConfigReader
from tests.models import oracles
from tests.models.test_config import WRONG

CASES = json.loads((oracles.ORACLES.parent / "rope" / "cases.json").read_text())
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "longrope": LONGROPE,
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
}
read = models.from_huggingface


def config_of(name):
    config = oracles.read_config(CASES[name]["weights"])
    del config["rope_parameters"]
    return {**config, **CASES[name]["changes"]}


def scaling_of(config):
    return "rope_scaling" if config.get("rope_scaling") else "rope_parameters"


@pytest.mark.parametrize("name", CASES)
def test_every_rope_parameter_has_a_type(name):
    """A value of another type is refused by its key, or means nothing to this type of rotation."""
    config = config_of(name)
    where, expected = scaling_of(config), read(config)
    for key, value in config.get(where, {}).items():
        whole = key == "original_max_position_embeddings"
        kind = float if type(value) is int and not whole else type(value)
        for wrong in WRONG.get(kind, ()) if key not in ("rope_type", "type") else ():
            changed = {**config, where: {**config[where], key: wrong}}
            try:
                found = read(changed)
            except ValueError as error:
                assert key in str(error)
            else:
                assert found == expected, (key, wrong)
                assert expected.rotary.rope_type in ("default", "dynamic")
                assert key in ("factor", "original_max_position_embeddings")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("mistral", "phi3"))])
def test_every_key_of_a_family_without_weights_of_its_own_has_a_type(name):
    config = {**config_of(name), "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    expected = read(config)
    for key, value in config.items():
        for wrong in WRONG.get(type(value), ()) if key != "model_type" else ():
            try:
                found = read({**config, key: wrong})
            except ValueError as error:
                assert key in str(error)
            else:
                assert found == expected, (key, wrong)


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_mean_the_same(name):
    config = config_of(name)
    scaling = dict(config.pop("rope_scaling", None) or {})
    parameters = {"rope_theta": config.pop("rope_theta", None), **config.pop("rope_parameters", {})}
    scaling = {**{k: v for k, v in parameters.items() if v is not None}, **scaling}
    expected = read({**config, "rope_parameters": scaling})
    theta, rope_type = scaling.pop("rope_theta", 10000.0), scaling.pop("rope_type", None)
    rope_type = rope_type or scaling.pop("type", "default")
    scaling.pop("type", None)
    assert expected.rotary == read(config_of(name)).rotary
    for key in ("type", "rope_type"):
        old = {**config, "rope_theta": theta, "rope_scaling": {**scaling, key: rope_type}}
        assert read(old) == expected


# Gemma 3 has two ways to rotate, see test_gemma3.py.
ONE_WAY = [name for name in oracles.NAMES if name != "gemma3"]


@pytest.mark.parametrize("name", ONE_WAY)
@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_scaling_counts_beside_rope_parameters_in_every_family(name, kind):
    config, scaling = oracles.read_config(name), dict(SCALINGS[kind])
    for key in ("short_factor", "long_factor"):
        if key in scaling:
            plain = read(config)
            scaling[key] = scaling[key][:1] * (plain.rotary.rotated(plain.head_dim) // 2)
    both = {**config, "rope_parameters": PLAIN, "rope_scaling": scaling, "rope_theta": 7e4}
    alone = {key: found for key, found in both.items() if key != "rope_parameters"}
    assert read(both) == read(alone)
    assert (read(both).rotary.rope_type, read(both).rotary.theta) == (kind, 7e4)
    assert read({**both, "rope_scaling": {}}).rotary.theta == PLAIN["rope_theta"]
    inside = read({**both, "rope_scaling": {**scaling, "rope_theta": 3e4}})
    assert inside.rotary.theta == 3e4  # as in transformers


@pytest.mark.parametrize(
    "name", [name for name in ONE_WAY if not name.startswith("glm") or name == "glm4_moe_lite"]
)
def test_heads_that_turn_in_part_are_refused_where_the_family_turns_them_whole(name):
    config = oracles.read_config(name)
    for changes in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        {"rope_parameters": None, "rope_scaling": {**YARN, "partial_rotary_factor": 0.5}},
    ):
        with pytest.raises(ValueError, match=r"partial_rotary_factor=0.5 is not supported: this"):
            read({**config, **changes})
    assert read({**config, "partial_rotary_factor": 1.0}) == read(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "garbage"}, "'garbage' is not supported; supported are 'default', 'linear', 'd"),
        ({"rope_type": 3}, "rope_type 3 is not supported"),
        ({"rope_type": "yarn"}, "rope parameters lack factor"),
        ({**YARN, "factor": 0}, "factor of the rope parameters must be a positive number, got 0"),
        ({**YARN, "truncate": "no"}, "truncate of the rope parameters must be true or false"),
        ({**YARN, "beta_fast": False}, "beta_fast of the rope parameters must be a positive"),
        ({**YARN, "rope_theta": 1.0}, r"yarn: theta \(=1.0\) must be greater than 1"),
        ({**YARN, "original_max_position_embeddings": 6.5}, "must be an integer, got 6.5"),
        ({"rope_type": "dynamic"}, "rope parameters lack factor"),
        ({**LONGROPE, "short_factor": None}, "rope parameters lack short_factor"),
        ({**LONGROPE, "short_factor": [1.0]}, "short_factor has 1 entries, expected 8"),
        (
            {**LONGROPE, "long_factor": [1.0] * 7 + [0]},
            "long_factor of .* a positive number, got 0",
        ),
        ({**LONGROPE, "long_factor": "1"}, "long_factor of .* a list of numbers, got '1'"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "must be 2 or more"),
        (
            {**LLAMA3, "high_freq_factor": 1.0},
            r"high_freq_factor \(=1.0\) must be greater than low",
        ),
        (
            {**YARN, "mrope_section": [2, 3, 3]},
            r"\['mrope_section'\] are unknown for rope_type 'ya",
        ),
    ],
)
def test_what_is_wrong_with_a_scaling_is_said(changes, message):
    config = oracles.read_config("llama")
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match=message):
            read({**config, key: changes})


def test_a_context_that_the_config_does_not_say_is_not_guessed():
    """Of a family that has none of its own."""
    for scaling in (SCALINGS["dynamic"], {**YARN, "factor": None}, {**LONGROPE, "factor": None}):
        reader = ConfigReader({"model_type": "goose", "rope_scaling": scaling})
        with pytest.raises(ValueError, match=r"lacks max_position_emb|lack original_max_position"):
            reader.rotary(theta=1e4)
    reader = ConfigReader({"model_type": "goose", "rope_scaling": YARN})
    assert reader.rotary(theta=1e4).factor == 4.0


SILENT = {  # of transformers' config classes: key-value heads of 32, head_dim, longest context
    "llama": (32, 16, 2048),
    "mistral": (8, 16, 131072),
    "phi3": (32, 16, 4096),
    "qwen2": (32, 16, 32768),
    "qwen3": (32, 128, 32768),
    "qwen3_moe": (4, 16, 32768),
    "ernie4_5": (2, 128, 131072),
    "ernie4_5_moe": (4, 16, 131072),
    "deepseek_v2": (1, 64, 2048),  # one latent, and the channels that are rotated
    "deepseek_v3": (1, 64, 4096),
    "glm": (2, 128, 131072),
    "glm4": (2, 128, 131072),
    "glm4_moe": (8, 16, 131072),
    "glm4_moe_lite": (1, 64, 202752),
    "gemma2": (4, 256, 8192),
    "gemma3_text": (4, 256, 131072),
    "gpt_oss": (8, 64, 131072),
    "granite": (32, 16, 2048),
    "seed_oss": (8, 128, 524288),
    "smollm3": (4, 16, 32768),
}
IN_HALF = ("glm", "glm4", "glm4_moe")
EXPERTS = {
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
    "ernie4_5_moe": {"moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 8},
    "deepseek_v2": {"num_experts_per_tok": 1},
}


@pytest.mark.parametrize("family", SILENT)
def test_what_each_family_means_where_its_config_is_silent(family):
    sizes = {"vocab_size": 8, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1}
    config = {"model_type": family, "num_attention_heads": 32, **sizes, **EXPERTS.get(family, {})}
    turned = SILENT[family][1] // (2 if family in IN_HALF else 1)
    factors = {key: [1.0] * (turned // 2) for key in ("short_factor", "long_factor")}
    found = read({**config, "rope_scaling": {"rope_type": "longrope", **factors}})
    assert (found.num_kv_heads, found.head_dim, found.max_position) == SILENT[family]
    assert found.rotary.original_max_position == found.max_position
    assert set(SILENT) == set(models.FAMILIES) - {
        "gemma3",
        "mistral3",
    }  # which are of text and images
    heads = 1 if found.num_kv_heads == 1 else 32  # null is an answer
    assert read({**config, "num_key_value_heads": None}).num_kv_heads == heads


def test_original_contexts_and_factors_that_disagree():
    """The one beside the parameters counts, and of `dynamic` none; a factor counts as it is."""
    config = {**oracles.read_config("llama"), "max_position_embeddings": 256}
    outside = {**config, "original_max_position_embeddings": 16}
    for kind in ("yarn", "llama3", "longrope"):
        scaling = {**SCALINGS[kind], "original_max_position_embeddings": 64}
        assert read({**config, "rope_scaling": scaling}).rotary.original_max_position == 64
        assert read({**outside, "rope_scaling": scaling}).rotary.original_max_position == 16
    dynamic = {**outside, "rope_scaling": SCALINGS["dynamic"]}
    assert read(dynamic).rotary.original_max_position == 256
    assert read({**outside, "rope_scaling": LONGROPE}).rotary.factor == 16
    assert read({**outside, "rope_scaling": {**LONGROPE, "factor": 3.0}}).rotary.factor == 3
    assert read({**outside, "rope_parameters": PLAIN}) == read({**config, "rope_parameters": PLAIN})


def test_phi3_calls_longrope_by_older_names_and_knows_no_other():
    config = config_of("phi3_longrope")
    for name in ("su", "yarn", "longrope"):
        renamed = {**config["rope_scaling"], "type": name}
        assert read({**config, "rope_scaling": renamed}) == read(config)
    del config["original_max_position_embeddings"]
    assert read(config).rotary.original_max_position == 4096
    with pytest.raises(ValueError, match="'linear' is not supported; supported are 'default', 'l"):
        read({**config, "rope_scaling": SCALINGS["linear"]})
    with pytest.raises(ValueError, match=r"partial_factor \(=1.5\) must be above 0 and at most 1"):
        read({**config, "rope_scaling": None, "partial_rotary_factor": 1.5})
    with pytest.raises(ValueError, match="short_factor has 6 entries, expected 8"):
        read({**config, "partial_rotary_factor": 1.0})


def test_windows_of_mistral_phi3_and_qwen3_moe():
    config = config_of("mistral")
    assert read(config).sliding_windows == (6, 6)
    assert read({**config, "sliding_window": None}).sliding_windows == ()
    assert read({**config, "sliding_window": None, "layer_types": None}).sliding_windows == ()
    kinds = ["full_attention", "sliding_attention"]
    assert read({**config, "layer_types": kinds}).sliding_windows == (None, 6)
    with pytest.raises(ValueError, match="mistral config lacks sliding_window"):
        read({**config, "sliding_window": None, "layer_types": kinds})
    del config["sliding_window"], config["num_key_value_heads"]
    config["num_attention_heads"] = 8
    silent = read(config)  # as in transformers
    assert (silent.sliding_windows, silent.num_kv_heads) == ((4096, 4096), 8)
    phi3 = config_of("phi3")
    assert read(phi3).sliding_windows == ()
    assert read({**phi3, "sliding_window": 6}).sliding_windows == (6, 6)
    with pytest.raises(ValueError, match="this family has 'full_attention' in all 2 layers"):
        read({**phi3, "layer_types": kinds})
    moe = {**oracles.read_config("qwen3_moe"), "use_sliding_window": True}
    assert read({**moe, "sliding_window": 6}).sliding_windows == (6, 6, 6)
    del moe["sliding_window"]
    assert read(moe).sliding_windows == (4096, 4096, 4096)
    qwen2 = oracles.read_config("qwen2_window")
    del qwen2["layer_types"], qwen2["max_window_layers"], qwen2["sliding_window"]
    assert read(qwen2).sliding_windows == ()  # the first 28 layers have none
    assert read({**qwen2, "max_window_layers": 2}).sliding_windows == (None, None, 4096)


def test_only_what_stretches_a_context_is_stored_besides():
    """Stored configs of models whose rotation is a plain one stay what they were."""
    stored = read(oracles.read_config("llama")).to_dict()["rotary"]
    assert sorted(stored) == [
        "factor", "high_freq_factor", "interleaved", "low_freq_factor", "original_max_position",
        "rope_type", "theta",
    ]  # fmt: skip
    for name in CASES:
        config = read(config_of(name))
        stored = json.loads(json.dumps(config.to_dict()))
        assert models.DecoderConfig.from_dict(stored) == config
