"""Reading config.json: everything is read, known to be neutral, or an error."""

import json

import jax
import numpy as np
import pytest

from fdq import models
from fdq.models import config_reader, deepseek_v3, ernie4_5, ernie4_5_moe
from tests.models import oracles


@pytest.mark.parametrize("name", models.CONFIGS)
def test_named_configs_build_and_survive_json(name):
    config = models.CONFIGS[name]
    assert models.DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.dtype == "bfloat16"


SIZES = {  # billions of parameters, from the models' names and papers
    "ernie-4.5-0.3b": 0.36,
    "ernie-4.5-21b-a3b": 21.8,
    "ernie-4.5-300b-a47b": 299,
    "llama-3-8b": 8.03,
    "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.24,
    "qwen2.5-0.5b": 0.494,
    "qwen3-0.6b": 0.596,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671,
    "glm-4.5-air": 106.85,
}


@pytest.mark.parametrize("name", SIZES)
def test_named_configs_have_as_many_parameters_as_published(name):
    leaves = jax.tree.leaves(models.abstract(models.CONFIGS[name]))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    assert count / 1e9 == pytest.approx(SIZES[name], rel=0.01)


def test_layers_with_experts():
    config = oracles.read_config("ernie4_5_moe")
    read = models.from_huggingface
    assert read({**config, "moe_layer_end_index": -1}).moe.layers == (1, 2)
    assert read({**config, "moe_layer_end_index": 1}).moe.layers == (1,)
    assert read({**config, "moe_layer_interval": 2}).moe.layers == (1,)
    assert read({**config, "moe_use_aux_free": False}).moe.correction_bias is False
    assert read(oracles.read_config("qwen3_moe")).moe.layers == (0, 2)
    assert read(oracles.read_config("qwen3_moe_nonorm")).moe.layers == (1,)


def test_layers_with_sliding_windows():
    config, read = oracles.read_config("qwen2_window"), models.from_huggingface
    assert read(config).sliding_windows == (None, 6, 6)
    del config["layer_types"]  # most published configs have none
    assert read(config).sliding_windows == (None, 6, 6)
    assert read({**config, "max_window_layers": 0}).sliding_windows == (6, 6, 6)
    assert read({**config, "max_window_layers": 3}).sliding_windows == ()
    assert read({**config, "use_sliding_window": False}).sliding_windows == ()
    assert [read(config).sliding_window(layer) for layer in range(3)] == [None, 6, 6]
    assert read(config).replace(num_layers=2).sliding_window(1) == 6
    assert models.CONFIGS["qwen3-8b"].sliding_window(3) is None
    with pytest.raises(ValueError, match="sliding_windows has 3 entries, expected one for each"):
        read(config).replace(num_layers=4)


def test_several_end_tokens():
    config = {**oracles.read_config("llama"), "eos_token_id": [5, 6]}
    assert models.from_huggingface(config).eos_token_ids == (5, 6)


def test_unsupported_model_type():
    with pytest.raises(ValueError, match=r"'gpt2' is not supported; supported are ernie4_5, .*moe"):
        models.from_huggingface({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="None is not supported"):
        models.from_huggingface({})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"logit_scale": 0.5}, r"does not know: \{'logit_scale': 0.5\}"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected 'silu'"),
        ("llama", {"vocab_size": None}, "llama config lacks vocab_size"),
        ("llama", {"vocab_size": "96"}, "vocab_size must be an integer of at least 1, got '96'"),
        ("llama", {"num_key_value_heads": 3}, r"\(=4\) must be divisible by num_kv_heads \(=3\)"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (
            "qwen3_moe",  # all layers have the window, in transformers too
            {
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["full_attention"] * 3,
            },
            "sliding_window=6 this family has 'sliding_attention' in all 3 layers",
        ),
        (
            "qwen3",  # without use_sliding_window
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types \['sliding_attention'\] are not supported",
        ),
        ("qwen2_window", {"sliding_window": None}, "qwen2 config lacks sliding_window"),
        ("qwen2_window", {"sliding_window": 0}, "sliding_window must be an integer of at least 1"),
        ("qwen2_window", {"layer_types": None, "max_window_layers": None}, "lacks max_window_lay"),
        (
            "qwen2_window",
            {"layer_types": ["full_attention", "sliding_attention", "chunked_attention"]},
            r"layer_types has 3 entries, \['chunked_attention'\] among them; expected 'full_atten",
        ),
        (
            "qwen2_window",
            {"layer_types": ["sliding_attention"]},
            "layer_types has 1 entries; expected .* for each of 3 layers",
        ),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias=True is not supported"),
        ("ernie4_5_moe", {"moe_gate_act": "sigmoid"}, "moe_gate_act='sigmoid' is not supported"),
        ("ernie4_5_moe", {"moe_num_experts": [64, 64]}, "moe_num_experts must be an integer"),
        ("ernie4_5", {"compression_ratio": 2.0}, "compression_ratio=2.0 is not supported"),
        ("llama", {"dtype": "int8"}, "expected float32, bfloat16 or float16"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}},
            "'ntk' is not supported; supported are 'default', 'linear', 'dynamic', 'yarn', 'longr",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            "rope parameters lack low_freq_factor",
        ),
        ("qwen3_moe", {"num_experts": 3, "num_local_experts": 2}, "num_experts=3 and num_local"),
        (
            "qwen3_moe",
            {"num_experts_per_tok": 99},
            "expected 1 to .*, the number of experts, fo",
        ),
        ("ernie4_5_moe", {"moe_k": 0}, "moe_k must be an integer of at least 1, got 0"),
        # What a config says of long contexts counts, beside the spelling of transformers 5 too.
        (
            "llama",
            {"rope_scaling": {"rope_type": "su", "factor": 4.0}},
            "'su' is not supported",
        ),
        (
            "llama",
            {"rope_scaling": {"type": ["dynamic"], "factor": 2.0}},
            r"\['dynamic'\] is not supported",
        ),
        ("qwen2", {"rope_scaling": {"type": "garbage"}}, "'garbage' is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": "4"}},
            "factor of the rope parameters must be a positive number, got '4'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}},
            r"rope parameters \['mrope_section'\] are unknown",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported: this family rotates whole heads",
        ),
        # Numbers that JSON holds and no float or token is.
        ("llama", {"rope_theta": 10**400}, "rope_theta must be a number of at least 0, got 1000"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 10**400}},
            "factor of the rope parameters must be a positive number, got 1000",
        ),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number of at least 0"),
        ("llama", {"eos_token_id": [2, 2**40]}, "eos_token_id must be a token number or a list"),
        ("ernie4_5_moe", {"moe_num_experts": 0}, "moe_num_experts must be an integer of at least"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size must be an integer of"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer of at"),
    ],
)
def test_what_changes_the_mathematics_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        models.from_huggingface({**oracles.read_config(name), **changes})


def test_switches_that_are_off_are_ignored():
    config = oracles.read_config("qwen3")
    more = {"some_switch": False, "some_size": None, "transformers_version": "9"}
    assert models.from_huggingface({**config, **more}) == models.from_huggingface(config)


def test_dicts_with_wrong_fields():
    fields = models.CONFIGS["ernie-4.5-21b-a3b"].to_dict()
    with pytest.raises(ValueError, match=r"model config: unknown fields \['more'\]"):
        models.DecoderConfig.from_dict({**fields, "more": 1})
    del fields["moe"]["top_k"]
    with pytest.raises(ValueError, match=r"model moe: unknown fields \[\], missing .*'top_k'"):
        models.DecoderConfig.from_dict(fields)
    with pytest.raises(ValueError, match="model rotary: expected a mapping, got NoneType"):
        models.DecoderConfig.from_dict({**fields, "moe": None, "rotary": None})


WRONG = {
    bool: ("false", 2, [True]),
    int: ("7", [[2]], 1.5, True, -7),
    float: ("500000", True, float("nan"), [1.0]),
    str: (5, ["silu"]),
    list: ("layers", [["full_attention"]], [1.5], 3),
    dict: ("default", [1], 4),
}


NEUTRAL = {
    *config_reader._NEUTRAL,
    *ernie4_5._NEUTRAL,
    *ernie4_5_moe._NEUTRAL,
    *deepseek_v3._NEUTRAL,
    "residual_dropout",
}


@pytest.mark.parametrize("name", oracles.NAMES)
@pytest.mark.parametrize("file", ["config.json", "config_v4.json"])
def test_every_key_has_a_type(name, file):
    """A value of another type is refused by its key, where anything depends on the key."""
    config, read = oracles.read_config(name, file), models.from_huggingface
    expected, refused = read(config), 0
    for key, value in config.items():
        for wrong in WRONG.get(type(value), ()) if key != "model_type" else ():
            try:
                found = read({**config, key: wrong})
            except ValueError as error:
                assert key.removeprefix("torch_") in str(error)
                refused += 1
            else:
                assert key in NEUTRAL and found == expected, (key, wrong)
    assert refused > 40


@pytest.mark.parametrize("name", oracles.NAMES)
def test_what_real_configs_carry_besides_is_let_through(name):
    config, read = oracles.read_config(name), models.from_huggingface
    more = {
        "is_llama_config": True,
        "transformers.js_config": {"dtype": "q4"},
        "_attn_implementation_autoset": True,
        "neftune_noise_alpha": 5.0,
        "max_length": 4096,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.1,
        "pad_token": "<pad>",
        "repetition_penalty": 1.1,
        "bad_words_ids": [[1]],
        "num_labels": 2,
        "problem_type": "single_label_classification",
        "is_decoder": True,
        "gradient_checkpointing": True,
        "pruned_heads": {},
        "pad_token_id": -1,
        # The rest of what transformers' GenerationConfig and older configs have.
        "stop_strings": ["User:"],
        "max_time": 3.0,
        "num_assistant_tokens": 5,
        "sequence_bias": [[[1], 2.0]],
        "watermarking_config": {"bias": 2.0},
        "router_jitter_noise": 0.1,
        "router_z_loss_coef": 0.1,
        "resid_dropout": 0.1,
        "embedding_dropout": 0.1,
        "loss_type": "ForCausalLMLoss",
        "sep_token": "<sep>",
        "_experts_implementation": "eager",
    }
    assert read({**config, **more}) == read({**config, "pad_token_id": None})
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "default":
        longer = {**config, "rope_parameters": {**rope, "factor": 4.0}}
        assert read(longer) == read(config)


def test_what_a_family_always_has_may_be_said():
    read = models.from_huggingface
    for name, key in (("qwen2", "qkv_bias"), ("qwen3", "use_qk_norm")):
        config = oracles.read_config(name)
        assert read({**config, key: True}) == read(config)
        with pytest.raises(ValueError, match=f"{key}=False is not supported; expected True"):
            read({**config, key: False})


def test_what_is_meant_where_a_config_is_silent():
    read = models.from_huggingface
    for name in ("qwen3", "ernie4_5"):
        config = {**oracles.read_config(name)}
        del config["head_dim"]
        assert read(config).head_dim == 128  # as in transformers, whatever the hidden size
    config = oracles.read_config("qwen2_window")
    del config["layer_types"]
    assert read({**config, "sliding_window": None}).sliding_windows == ()


@pytest.mark.parametrize(
    ("name", "key", "found"),
    [
        ("deepseek_v3", "norm_topk_prob", lambda config: config.moe.normalize),
        ("deepseek_v3", "rope_interleave", lambda config: config.rotary.interleaved),
        ("seed_oss", "attention_bias", lambda config: config.qkv_bias),
    ],
)
def test_null_is_false_whatever_a_lacking_key_means(name, key, found):
    read, config = models.from_huggingface, oracles.read_config(name)
    assert found(read({other: value for other, value in config.items() if other != key})) is True
    assert found(read({**config, key: None})) is False  # as in transformers


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_rope_scaling_counts_beside_rope_parameters():
    """As in transformers, where it is in place of all of them; theta is then that of the top."""
    read, config = models.from_huggingface, oracles.read_config("llama")
    both = {**config, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    rotary = read(both).rotary
    assert (rotary.rope_type, rotary.factor, rotary.theta) == ("linear", 4.0, 10000.0)
    assert read({**both, "rope_theta": 5e5}).rotary.theta == 5e5
    inside = {**both["rope_scaling"], "rope_theta": 7e4}
    assert read({**both, "rope_theta": 5e5, "rope_scaling": inside}).rotary.theta == 7e4
    assert read({**config, "rope_scaling": {}}) == read({**config, "rope_scaling": None})


def test_the_original_length_of_llama3_is_that_of_the_model_where_nothing_else_is_said():
    read, config = models.from_huggingface, oracles.read_config("llama")
    config |= {"max_position_embeddings": 777, "rope_parameters": LLAMA3}
    assert read(config).rotary.original_max_position == 777
    config["original_max_position_embeddings"] = 99
    assert read(config).rotary.original_max_position == 99
    del config["max_position_embeddings"], config["original_max_position_embeddings"]
    assert read(config).rotary.original_max_position == 2048  # of this family, in transformers


def test_dtype_counts_where_torch_dtype_says_something_else():
    config = {**oracles.read_config("llama"), "dtype": "float32", "torch_dtype": "bfloat16"}
    assert models.from_huggingface(config).dtype == "float32"
