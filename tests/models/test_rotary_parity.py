"""Stretched, partial and windowed positions against transformers: forward passes and decoding."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fdq
from fdq import models
from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import functional
from fdq.decoding.loop import prefill
from tests.covering import slow_but
from tests.models import oracles

FOLDER = oracles.ORACLES.parent / "rope"
CASES = json.loads((FOLDER / "cases.json").read_text())
LENGTHS = {"short": (24, (7, 23)), "long": (80, (15, 31, 47, 63, 79))}
STEPS, KEPT_STEPS = 24, (0, 1, 7, 15, 23)


@functools.cache
def expected():
    return dict(np.load(FOLDER / "expected.npz"))


def config_of(name):
    base = oracles.read_config(CASES[name]["weights"])
    del base["rope_parameters"]
    return models.from_huggingface({**base, **CASES[name]["changes"]})


def model_of(name):
    tensors = load_file(oracles.ORACLES / CASES[name]["weights"] / "model.safetensors")
    return oracles.fill(models.abstract(config_of(name)), tensors)


def usual(name):
    """One set of shapes, whose operations are compiled once for all cases, and two others."""
    return CASES[name]["weights"] == "llama" or name in ("yarn_ernie", "qwen2_windows")


@pytest.mark.parametrize("name", slow_but(list(filter(usual, CASES)), CASES))
def test_logits_below_and_above_the_original_context(name):
    """In eager mode: tiny operations, not a whole model for each case, are compiled."""
    model, wanted = model_of(name), expected()
    tokens = jnp.asarray(wanted[f"{name}/tokens"][None], jnp.int32)
    logits = model(tokens)[0]
    for run, (length, positions) in LENGTHS.items():
        if model.config.rotary.by_length and length < len(logits):
            logits_here = model(tokens[:, :length])[0]
        else:  # what comes later changes nothing
            logits_here = logits
        assert np.std(wanted[f"{name}/{run}"]) > 0.3
        np.testing.assert_allclose(
            logits_here[jnp.asarray(positions)], wanted[f"{name}/{run}"], rtol=0, atol=1e-4
        )


DECODED = [name for name, case in CASES.items() if case["prompts"]]


@pytest.mark.parametrize("name", slow_but(("longrope",), DECODED))
def test_greedy_tokens_and_their_logits_through_the_cache(name):
    """As `generate` decodes each prompt alone, though they share a batch and are read in pieces.

    The first prompt of most cases grows past the original context on the way, and the second is
    longer from the start.
    """
    lengths = CASES[name]["prompts"]
    prompts = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in zip(prompts, lengths, strict=True):
        row[:length] = expected()[f"{name}/prompt_{length}"]
    model = model_of(name)
    cache = KVCache.init(model.config, len(lengths), max(lengths) + STEPS)
    warned = contextlib.nullcontext()
    if model.config.rotary.rope_type == "longrope":
        warned = pytest.warns(UserWarning, match=r"may grow past 32 tokens.*long_factor as short_")
    with warned:
        state = prefill(model, prompts, cache, lengths=lengths, chunk=16)
    step, params = functional(model)
    step, found = jax.jit(step), []
    for _ in range(STEPS):
        logits, state = step(params, state)
        found.append(logits)
        state = state.push(logits.argmax(-1))
    tokens = state.generated()
    for row, length in enumerate(lengths):
        assert tokens[row] == expected()[f"{name}/greedy_{length}"].tolist()
        logits = np.stack([found[at][row] for at in KEPT_STEPS])
        wanted = expected()[f"{name}/greedy_logits_{length}"]
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3_longrope", "mistral"])
def test_families_are_loaded_from_their_own_files(name, tmp_path):
    """Phi-3 stores queries, keys and values in one tensor, and gate and up."""
    base = oracles.read_config(CASES[name]["weights"])
    del base["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**base, **CASES[name]["changes"]}))
    tensors = load_file(oracles.ORACLES / CASES[name]["weights"] / "model.safetensors")
    for layer in range(base["num_hidden_layers"]) if "phi3" in name else ():
        for half, parts in (("self_attn", "q k v"), ("mlp", "gate up")):
            prefix = f"model.layers.{layer}.{half}."
            found = [tensors.pop(f"{prefix}{part}_proj.weight") for part in parts.split()]
            joined = {"q k v": "qkv", "gate up": "gate_up"}[parts]
            tensors[f"{prefix}{joined}_proj.weight"] = np.concatenate(found)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded, model = fdq.load(tmp_path), model_of(name)
    assert loaded.config == model.config
    same = jax.tree.map(np.array_equal, fdq.functional(loaded)[1], fdq.functional(model)[1])
    assert all(jax.tree.leaves(same))
