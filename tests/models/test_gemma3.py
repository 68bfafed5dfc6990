"""Gemma 3: what its configs say, of text and of more, and the text half of a multimodal one."""

import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fdq
from fdq.models import from_huggingface as read
from fdq.nn.rotary import RotaryConfig
from tests.models import oracles

CONFIG = oracles.read_config("gemma3")
LINEAR = {"rope_type": "linear", "factor": 8.0}


def silent(**changes):
    """The config without what says which layers see what, and how they rotate."""
    gone = {"layer_types", "rope_parameters", "_sliding_window_pattern"}
    return {key: found for key, found in CONFIG.items() if key not in gone} | changes


def test_windows_and_rotations_of_a_config_that_does_not_say():
    config = read(silent(num_hidden_layers=8))
    assert config.sliding_windows == (6, 6, 6, 6, 6, None, 6, 6)
    assert config.rotary == RotaryConfig(theta=1e6)
    assert config.local_rotary == RotaryConfig(theta=1e4)
    assert [config.rotary_of(layer).theta for layer in (4, 5, 6)] == [1e4, 1e6, 1e4]
    assert read(silent(num_hidden_layers=3, sliding_window_pattern=2)).sliding_windows[1] is None


def test_the_older_spelling_stretches_layers_that_see_everything():
    config = read(silent(rope_theta=7e5, rope_local_base_freq=5e3, rope_scaling=LINEAR))
    assert config.rotary == RotaryConfig(theta=7e5, rope_type="linear", factor=8.0)
    assert config.local_rotary == RotaryConfig(theta=5e3)


def test_a_scaling_is_laid_over_the_parameters_of_layers_that_see_everything():
    """As in transformers: what it does not say stays, the type included."""
    config = read({**CONFIG, "rope_scaling": {"factor": 2.0, "type": "linear"}})
    assert config.rotary == RotaryConfig(theta=1e6, rope_type="linear", factor=2.0)
    assert config.local_rotary == read(CONFIG).local_rotary
    with pytest.raises(ValueError, match="rope_scaling says type='linear'"):
        read(silent(rope_scaling={"factor": 2.0, "type": "linear"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"final_logit_softcapping": 0}, "final_logit_softcapping must be a positive number"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, "expected 'gelu_pytorch_tanh'"),
        ({"rope_parameters": LINEAR}, r"\['factor', 'rope_type'\], expected 'full_attention'"),
        ({"rope_parameters": {"sliding_attention": 3}}, "sliding_attention must be an object"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "local_rotary: rope_type 'dynamic' depends on the length",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "type='yarn', which transformers does not read in this family: .* rope_type='linear'",
        ),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be an integer of at least 1"),
    ],
)
def test_what_is_not_computed_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        read({**CONFIG, **changes})


def test_gemma_2_caps_scores_and_logits_unless_its_config_says_null():
    config = oracles.read_config("gemma2")
    silent = {key: found for key, found in config.items() if "softcapping" not in key}
    assert (read(silent).attention.softcap, read(silent).logit_softcap) == (50.0, 30.0)
    null = read(silent | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (null.attention.softcap, null.logit_softcap) == (None, None)
    assert read(silent | {"layer_types": None, "num_hidden_layers": 3}).sliding_windows[1] is None


def test_embeddings_are_scaled_in_their_own_dtype_and_norms_stay_exact():
    """As in transformers: the square root is rounded to bfloat16 first, 1 + w is not."""
    model = fdq.load(oracles.ORACLES / "gemma3", dtype="bfloat16")
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    run = jax.jit(lambda model, tokens: model(tokens, return_hidden_states=True)[1]["embed_tokens"])
    table = np.asarray(model.embed_tokens.embedding[...])[:8]
    scale = np.asarray(48**0.5, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(run(model, tokens))[0], table * scale)
    stored = load_file(oracles.ORACLES / "gemma3" / "model.safetensors")["model.norm.weight"]
    assert model.norm.scale.dtype == jnp.float32
    np.testing.assert_array_equal(model.norm.scale[...], stored + np.float32(1))


def multimodal(folder, root, head=None):
    """The oracle as the text half of a multimodal model, under names that begin with `root`."""
    folder.mkdir()
    tensors = load_file(oracles.ORACLES / "gemma3" / "model.safetensors")
    tensors = {name.replace("model.", root, 1): array for name, array in tensors.items()}
    if head is not None:
        tensors[head] = tensors[f"{root}embed_tokens.weight"].copy()
    tensors["vision_tower.embeddings.patch_embedding.weight"] = np.ones((2, 2), np.float32)
    tensors["multi_modal_projector.mm_input_projection_weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, folder / "model.safetensors")
    text = {key: found for key, found in CONFIG.items() if key not in ("dtype", "architectures")}
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "dtype": "float32",
        "eos_token_id": [1, 106],
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16},
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("root", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        pytest.param("model.language_model.", "lm_head.weight", marks=pytest.mark.slow),
    ],
)
def test_of_a_multimodal_model_the_text_is_read_and_what_is_not_is_named(
    root, head, tmp_path, caplog
):
    folder = multimodal(tmp_path / "model", root, head)
    with caplog.at_level(logging.WARNING, logger="fdq"):
        model = fdq.load(folder)
    assert "vision_tower.* (1 tensors), multi_modal_projector.* (1 tensors)" in caplog.text
    assert model.config.eos_token_ids == (1, 106)
    expected = dict(np.load(oracles.ORACLES / "gemma3" / "expected.npz"))
    logits = jax.jit(lambda model, tokens: model(tokens))(model, expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    assert fdq.plan(folder, "W8A16").weights.parameters > 0


def test_other_multimodal_models_are_refused_with_what_they_are_of():
    config = {
        "model_type": "qwen2_5_vl",
        "text_config": {"model_type": "qwen2_5_vl_text"},
        "vision_config": {"model_type": "qwen2_5_vl"},
    }
    said = r"multimodal model, of text 'qwen2_5_vl_text' beside vision_config, and fdq has no part"
    with pytest.raises(ValueError, match=said):
        read(config)
    with pytest.raises(ValueError, match="text_config must be that of a gemma3_text model, got 'q"):
        read(config | {"model_type": "gemma3"})
