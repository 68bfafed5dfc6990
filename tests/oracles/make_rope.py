"""Makes `rope/`: what transformers computes where a config stretches, narrows or windows positions.

    python make_rope.py                   # all cases
    python make_rope.py --check           # only run them again and compare

The weights are those of `models/`; a case is a change of the config of one of them. Each is run
once over few and once over many tokens, on both sides of the original context of most of them, and
some are decoded greedily through the cache. Frequencies depend on the past in transformers, so
every run is one of a new model.
"""

import argparse
import json
import pathlib
import tempfile
import zlib

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = HERE / "rope"
MIN_MARGIN = 1e-3
RUNS = {"short": (24, (7, 23)), "long": (80, (15, 31, 47, 63, 79))}  # tokens; positions kept
STEPS, KEPT_STEPS = 24, (0, 1, 7, 15, 23)

SHORT = [1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.1, 2.6]
LONG = [1.0, 1.3, 1.8, 2.4, 3.1, 4.0, 5.2, 6.7]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def stretched(scaling: dict, **changes) -> dict:
    """The old spelling, of a context of 128."""
    return {
        "max_position_embeddings": 128, "rope_theta": 10000.0, "rope_scaling": scaling, **changes
    }  # fmt: skip


def parameters(scaling: dict, **changes) -> dict:
    """The spelling of transformers 5."""
    return {
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 10000.0, **scaling},
        **changes,
    }


DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
PHI3 = {"model_type": "phi3", "original_max_position_embeddings": 32}
MISTRAL = {"model_type": "mistral", "sliding_window": 6}
# name: whose weights, what changes in its config (whose rope_parameters are taken out), and the
# lengths of prompts that are decoded greedily.
CASES = {
    "default_factor": ("llama", parameters({"rope_type": "default", "factor": 4.0}), ()),
    "linear": ("llama", stretched({"type": "linear", "factor": 4.0}), ()),
    "linear_new": ("qwen3", parameters({"rope_type": "linear", "factor": 2.5}), ()),
    "linear_ernie": ("ernie4_5", stretched({"rope_type": "linear", "factor": 2.0}), ()),
    "dynamic": ("llama", stretched(DYNAMIC, max_position_embeddings=32), (20, 40)),
    "dynamic_original": (
        "qwen2",  # its original length means nothing
        parameters(
            {**DYNAMIC, "original_max_position_embeddings": 16}, max_position_embeddings=48
        ),
        (),
    ),
    "dynamic_ernie": ("ernie4_5", parameters(DYNAMIC, max_position_embeddings=32), ()),
    "yarn": ("llama", stretched(YARN), (20, 40)),
    "yarn_qwen2": ("qwen2", stretched({**YARN, "type": "yarn"}, rope_theta=1e6), ()),
    "yarn_both_spellings": ("llama", {**parameters(PLAIN), "rope_scaling": YARN}, ()),
    "yarn_attention_factor": ("qwen3", parameters({**YARN, "attention_factor": 0.7}), ()),
    "yarn_mscale": ("llama", stretched({**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}), ()),
    "yarn_mscale_alone": ("llama", stretched({**YARN, "mscale": 1.5}), ()),
    "yarn_betas": (
        "llama",
        parameters({**YARN, "beta_fast": 8, "beta_slow": 0.5, "truncate": False}),
        (),
    ),
    "yarn_no_factor": ("llama", stretched({**YARN, "factor": None}), ()),
    "yarn_original_outside": (
        "llama",
        stretched({"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=16),
        (),
    ),
    "yarn_ernie": ("ernie4_5", stretched(YARN, rope_theta=5e5), ()),
    "yarn_moe": ("qwen3_moe", stretched(YARN), ()),
    "longrope": (
        "llama",
        parameters({**LONGROPE, "factor": 4.0, "original_max_position_embeddings": 32}),
        (20, 40),
    ),
    "longrope_no_factor": ("qwen2", stretched(LONGROPE, original_max_position_embeddings=32), ()),
    "longrope_attention_factor": (
        "llama",
        stretched(
            {**LONGROPE, "attention_factor": 1.3, "original_max_position_embeddings": 48}
        ),
        (),
    ),
    "llama3": ("llama", stretched({**LLAMA3, "original_max_position_embeddings": 32}), ()),
    "llama3_no_original": ("qwen3", parameters(LLAMA3, max_position_embeddings=32), ()),
    "mistral": ("llama", {**parameters(PLAIN), **MISTRAL}, (20, 40)),
    "mistral_yarn": ("llama", {**stretched(YARN), **MISTRAL, "sliding_window": 40}, ()),
    "mistral_silent": ("llama", {**parameters(PLAIN), "model_type": "mistral"}, ()),
    "mistral_layers": (
        "llama",
        {
            **parameters(PLAIN),
            **MISTRAL,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        (),
    ),
    "qwen2_windows": (
        "qwen2_window",
        {**stretched(YARN), "layer_types": None, "max_window_layers": 2, "sliding_window": 20},
        (),
    ),
    "qwen3_moe_windows": (
        "qwen3_moe",
        {**parameters(PLAIN), "use_sliding_window": True, "sliding_window": 6},
        (),
    ),
    "phi3": ("llama", {**parameters(PLAIN), **PHI3}, ()),
    "phi3_partial": (
        "llama",
        {**stretched({}), **PHI3, "partial_rotary_factor": 0.75, "sliding_window": 40},
        (),
    ),
    "phi3_longrope": (
        "llama",
        {
            **stretched({"type": "longrope", "short_factor": SHORT[:6], "long_factor": LONG[:6]}),
            **PHI3,
            "partial_rotary_factor": 0.75,
        },
        (8, 40),  # on one side of 32 each: transformers reads all anew where Phi-3 goes past it
    ),
}  # fmt: skip


def config_of(base: str, changes: dict) -> dict:
    """The config.json of a case."""
    config = json.loads((HERE / "models" / base / "config.json").read_text())
    del config["rope_parameters"]
    return {**config, **changes}


def fused(tensors: dict) -> dict:
    """Llama's tensors as Phi-3 has them."""
    result = dict(tensors)
    for name in tensors:
        prefix = name.rsplit("_proj", 1)[0].rsplit(".", 1)[0]
        if name.endswith("q_proj.weight"):
            parts = [result.pop(f"{prefix}.{x}_proj.weight") for x in "qkv"]
            result[f"{prefix}.qkv_proj.weight"] = torch.cat(parts)
        if name.endswith("gate_proj.weight"):
            parts = [result.pop(f"{prefix}.{x}_proj.weight") for x in ("gate", "up")]
            result[f"{prefix}.gate_up_proj.weight"] = torch.cat(parts)
    return result


def built(base: str, changes: dict) -> transformers.PreTrainedModel:
    """A new model of a case."""
    tensors = load_file(HERE / "models" / base / "model.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(base, changes)
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        if config["model_type"] == "phi3":
            tensors = fused(tensors)
        save_file(tensors, pathlib.Path(folder) / "model.safetensors", {"format": "pt"})
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def run(base: str, changes: dict, tokens: np.ndarray) -> np.ndarray:
    """[length, vocab] float32 logits of one forward pass of a new model."""
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        return built(base, changes)(ids, use_cache=False).logits[0].numpy()


def greedy(base: str, changes: dict, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`STEPS` tokens through the cache of a new model, and the logits that chose them."""
    with torch.no_grad():
        found = built(base, changes).generate(
            torch.from_numpy(prompt.astype(np.int64))[None],
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=STEPS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return found.sequences[0, len(prompt) :].numpy(), torch.cat(found.logits).numpy()


def expected(name: str) -> dict[str, np.ndarray]:
    """The arrays of one case, by `<case>/<what>`."""
    base, changes, lengths = CASES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    vocab = config_of(base, changes)["vocab_size"]
    tokens = rng.integers(3, vocab, RUNS["long"][0])
    arrays = {f"{name}/tokens": tokens.astype(np.int16)}
    plain = {"rope_parameters": PLAIN}
    for kind, (length, positions) in RUNS.items():
        logits = run(base, changes, tokens[:length])
        arrays[f"{name}/{kind}"] = logits[list(positions)]
    if not name.startswith(("default", "phi3", "mistral")) or name == "phi3_partial":
        before = run(base, plain, tokens)[list(positions)]
        change = np.abs(before - arrays[f"{name}/long"]).max()
        assert change > 0.1, f"{name}: what the config says has no effect ({change})"
    for length in lengths:
        for _ in range(50):
            prompt = rng.integers(3, vocab, length)
            chosen, logits = greedy(base, changes, prompt)
            best = np.sort(logits, axis=-1)
            if (best[:, -1] - best[:, -2]).min() > MIN_MARGIN and len(np.unique(chosen)) > 6:
                break
        else:
            raise RuntimeError(f"{name}: no well-posed prompt in 50")
        arrays[f"{name}/prompt_{length}"] = prompt.astype(np.int16)
        arrays[f"{name}/greedy_{length}"] = chosen.astype(np.int16)
        arrays[f"{name}/greedy_logits_{length}"] = logits[list(KEPT_STEPS)]
    return arrays


def main() -> None:
    """Makes the cases, or with `--check` compares them with what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arrays = {}
    for name in CASES:
        arrays |= expected(name)
        print(name)
    cases = {
        name: {"weights": base, "changes": changes, "prompts": list(lengths)}
        for name, (base, changes, lengths) in CASES.items()
    }
    if not options.check:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
        np.savez_compressed(FOLDER / "expected.npz", **arrays)
    assert json.loads((FOLDER / "cases.json").read_text()) == cases
    stored = dict(np.load(FOLDER / "expected.npz"))
    assert sorted(stored) == sorted(arrays)
    for key, found in arrays.items():
        np.testing.assert_allclose(stored[key], found, rtol=0, atol=2e-5, err_msg=key)


if __name__ == "__main__":
    main()
