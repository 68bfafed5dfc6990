"""Makes `peft/<name>/`: adapters of random numbers for `models/llama`, as PEFT saves them.

    python make_peft.py                     # all of them
    python make_peft.py --check             # only reload and verify what is there
    python make_peft.py --load DIR          # adapters that fdq wrote, with its logits beside them

Beside them stands `expected.npz`: the logits of the model with its adapters for the `input_ids` of
the model's own `expected.npz`, and one weight as PEFT merges it. `--load` takes a directory that
`fdq.save_lora` wrote for a model of `models/llama`, and in which `logits.npy` is what fdq computes.
"""

import argparse
import pathlib
import shutil
import warnings

import numpy as np
import peft
import torch
import transformers

warnings.filterwarnings("ignore")
HERE = pathlib.Path(__file__).resolve().parent
MODEL = HERE / "models" / "llama"
MERGED = "model.layers.1.self_attn.q_proj"
CASES = {
    # Parts of fused layers, of several ranks and factors.
    "patterns": peft.LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj", "gate_proj", "down_proj", "lm_head"],
        rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 5},
        alpha_pattern={"layers.1.self_attn.q_proj": 1},
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
    ),
    "all_linear": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    ),
}


def model() -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(tuned: torch.nn.Module) -> np.ndarray:
    ids = torch.from_numpy(np.load(MODEL / "expected.npz")["input_ids"]).long()
    with torch.no_grad():
        return tuned(ids).logits.numpy()


def make(name: str) -> None:
    folder = HERE / "peft" / name
    shutil.rmtree(folder, ignore_errors=True)
    tuned = peft.get_peft_model(model(), CASES[name]).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in sorted(tuned.named_parameters()):
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()  # a model card without content
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(MODEL), "models/llama"))
    with_adapters = logits(tuned)
    merged = dict(tuned.merge_and_unload().named_modules())[MERGED].weight.detach().numpy()
    np.savez_compressed(folder / "expected.npz", logits=with_adapters, merged=merged)


def check(folder: pathlib.Path, expected: np.ndarray, tolerance: float) -> None:
    tuned = peft.PeftModel.from_pretrained(model(), folder).eval()
    found, plain = logits(tuned), logits(model())
    error = np.abs(found - expected).max() / np.abs(expected).max()
    moved = np.abs(found - plain).max() / np.abs(plain).max()
    print(f"{folder}: {error:.2e} apart, the adapters change the logits by {moved:.2f}")
    assert error <= tolerance and moved > 0.05, folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--load", type=pathlib.Path)
    options = parser.parse_args()
    if options.load:
        check(options.load, np.load(options.load / "logits.npy"), 1e-5)
    else:
        for name in CASES:
            if not options.check:
                make(name)
            check(HERE / "peft" / name, np.load(HERE / "peft" / name / "expected.npz")["logits"], 0)
