"""Makes `gpt_oss_mxfp4/`: a tiny gpt-oss with its experts in MXFP4, as large ones are published.

    python make_gpt_oss.py

The blocks and scales of the experts are random, all else is random floats in bfloat16.
`expected.npz` has what transformers decodes one expert to, and its logits with all of them decoded,
in float32.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent / "gpt_oss_mxfp4"
HIDDEN, WIDTH, EXPERTS = 64, 64, 4
SHOWN = 2  # of the experts of the last layer
CONFIG = transformers.GptOssConfig(
    vocab_size=96,
    hidden_size=HIDDEN,
    intermediate_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
    sliding_window=8,
    max_position_embeddings=256,
    attn_implementation="eager",
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
)
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def main() -> None:
    """Writes the checkpoint, and what transformers makes of it."""
    torch.manual_seed(11)
    transformers.logging.set_verbosity_error()
    shutil.rmtree(HERE, ignore_errors=True)
    model = transformers.GptOssForCausalLM(CONFIG).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "experts" not in name and "norm" not in name:
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 4
            parameter.data = (torch.randn(parameter.shape) / fan_in**0.5).to(torch.bfloat16)
    model.save_pretrained(HERE)
    (HERE / "generation_config.json").unlink(missing_ok=True)
    file, tensors = HERE / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            _, k, n = tensor.shape
            blocks = torch.randint(0, 256, (EXPERTS, n, k // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 125, (EXPERTS, n, k // 32), dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        elif name.endswith("proj_bias"):
            tensors[name] = (torch.randn(tensor.shape) * 0.3).to(torch.bfloat16)
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((HERE / "config.json").read_text())
    text = json.dumps(config | {"quantization_config": QUANTIZATION}, indent=2, sort_keys=True)
    (HERE / "config.json").write_text(text + "\n")

    decoded = transformers.AutoModelForCausalLM.from_pretrained(
        HERE,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )
    decoded = decoded.float().eval()
    experts = decoded.model.layers[-1].mlp.experts
    ids = torch.randint(3, 96, (2, 20))
    with torch.no_grad():
        logits = decoded(ids, use_cache=False).logits.numpy()
    np.savez_compressed(
        HERE / "expected.npz",
        ids=ids.numpy().astype(np.int32),
        logits=logits,
        gate_up_proj=experts.gate_up_proj[SHOWN].detach().numpy(),
        down_proj=experts.down_proj[SHOWN].detach().numpy(),
    )
    file.chmod(0o644)
    size = sum(one.stat().st_size for one in HERE.iterdir())
    print(f"{HERE.name}: {size:,} bytes, logits std {logits.std():.2f}")


if __name__ == "__main__":
    main()
