"""Families whose layers have something that the others have not, and those that are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq import models
from fdq.decoding import programs
from fdq.decoding.functional import functional
from fdq.decoding.loop import prefill
from fdq.models import config_writer
from fdq.nn import attention
from fdq.nn.parameters import split
from tests.checkpoints import builders
from tests.models import oracles

MORE = ("glm4", "granite", "seed_oss", "smollm3")


@pytest.mark.parametrize("name", MORE)
def test_what_is_written_reads_as_the_same(name):
    config = oracles.oracle_config(name)
    written = config_writer.to_huggingface(config)
    assert models.from_huggingface(written) == config
    assert models.DecoderConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_next", "'qwen3_next' is not supported: its layers have gated delta nets"),
        ("olmo2", "norms of all heads together, which fdq has no part for"),
    ],
)
def test_families_that_fdq_has_no_part_for_are_refused_by_what_they_have(name, reason):
    with pytest.raises(ValueError, match=reason):
        models.from_huggingface({"model_type": name})


def test_the_text_half_of_a_multimodal_mistral():
    text = oracles.read_config("llama")
    text |= {"model_type": "mistral", "rope_parameters": {"rope_theta": 1e6}, "head_dim": 16}
    text = {key: found for key, found in text.items() if key not in ("mlp_bias", "attention_bias")}
    whole = {
        "model_type": "mistral3",
        "text_config": text,
        "vision_config": {"model_type": "pixtral"},
        "image_token_index": 10,
        "vision_feature_layer": -1,
        "spatial_merge_size": 2,
    }
    config = models.from_huggingface(whole)
    assert config == models.from_huggingface(text).replace(model_type="mistral3")
    assert config_writer.to_huggingface(config)["model_type"] == "mistral"
    whole["text_config"] = {"model_type": "ministral3"}
    with pytest.raises(ValueError, match="text_config must be that of a mistral model"):
        models.from_huggingface(whole)


@pytest.mark.parametrize("root", ["language_model.model.", "model.language_model."])
def test_the_tensors_of_a_multimodal_mistral(tmp_path, root):
    """Under both names that programs gave them; those of images are left out."""
    tensors = builders.model("llama", tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert not config["tie_word_embeddings"] and "lm_head.weight" in tensors
    head = "language_model.lm_head." if root.startswith("language_model") else "lm_head."
    named = {name.replace("model.", root, 1): x for name, x in tensors.items()}
    named[f"{head}weight"] = named.pop("lm_head.weight")
    vision = "vision_tower.x.weight" if head != "lm_head." else "model.vision_tower.x.weight"
    named[vision] = np.ones((2, 2), np.float32)
    (tmp_path / "whole").mkdir()
    builders.write(tmp_path / "whole" / "model.safetensors", named)
    text = {k: v for k, v in config.items() if k not in ("mlp_bias", "attention_bias")}
    text |= {"model_type": "mistral", "sliding_window": None}
    # transformers writes true by default, of the whole.
    whole = {"model_type": "mistral3", "text_config": text, "tie_word_embeddings": True}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    found, expected = (fdq.load(tmp_path / name) for name in ("whole", "text"))
    assert found.config == expected.config.replace(model_type="mistral3")
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_list_is_made_of_more_layers_than_any_model_has():
    for name in ("smollm3", "llama"):
        config = oracles.read_config(name) | {"num_hidden_layers": 10**12}
        for kind in (config["model_type"], "mistral"):
            with pytest.raises(ValueError, match="num_hidden_layers must be at most 1024"):
                models.from_huggingface(config | {"model_type": kind})


def test_residuals_are_multiplied_in_float32():
    """0.22 is no number of bfloat16: 3 * 0.22 rounded once is 0.66015625, twice 0.65625."""
    config = oracles.oracle_config("granite").replace(dtype="bfloat16")
    layer = models.abstract(config).layers[0]
    layer.scale = 0.22
    found = layer._scaled(jnp.full((4,), 3, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16 and found.tolist() == [0.66015625] * 4


@pytest.mark.parametrize(
    ("name", "key", "found", "reason"),
    [
        ("smollm3", "no_rope_layers", [1, 2, 0], "0 or 1 for each of 3 layers"),
        ("granite", "logits_scaling", 0, "logits_scaling must be a positive number"),
    ],
)
def test_values_that_make_no_model_are_refused(name, key, found, reason):
    with pytest.raises(ValueError, match=reason):
        models.from_huggingface(oracles.read_config(name) | {key: found})


def test_queries_are_read_in_smaller_blocks_where_scores_would_fill_memory(rng, monkeypatch):
    q, k, v = (jnp.asarray(rng.standard_normal((1, 70, 4, 8)), jnp.float32) for _ in range(3))
    whole = jax.jit(attention.causal_attention)(q, k, v)
    monkeypatch.setattr(attention, "_MOST_SCORES", 4 * 70 * 33)
    lowered = jax.jit(lambda *a: attention.causal_attention(*a)).lower(q, k, v)
    text = lowered.as_text()
    assert "x33x70xf32" in text and "x70x70xf32" not in text
    np.testing.assert_allclose(lowered.compile()(q, k, v), whole, atol=1e-6)


@pytest.mark.slow
def test_a_loop_of_steps_reads_what_latents_are_multiplied_by_and_decodes_nothing():
    model, expected = oracles.oracle("deepseek_v3_plain")
    quantized = fdq.quantize(model, "W4A16-g8", method="absmax")
    codes = quantized.layers[0].self_attn.kv_b_proj.kernel.codes
    state = prefill(quantized, expected["prompt"], quantized.init_cache(2, 32))
    template, params = split(quantized)
    stop = jnp.zeros((0,), jnp.int32)
    traced = programs.decode.trace(template, params, state, stop, steps=3)
    (loop,) = (eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan")
    read = [(var.aval.shape, var.aval.dtype) for var in loop.invars]
    assert (codes.shape, codes.dtype) not in read
    rank, heads = quantized.config.attention.rank, quantized.config.num_heads
    decoded = [shape for shape, _ in read if shape[:2] == (rank, heads)]
    assert len(decoded) == 2 * quantized.config.num_layers
    made = functional(quantized)
    step, one = jax.jit(made.step), state
    for _ in range(3):
        logits, one = step(made.params, one)
        one = one.push(jnp.argmax(logits, axis=-1))
    assert fdq.decode(quantized, state, steps=3).generated() == one.generated()
