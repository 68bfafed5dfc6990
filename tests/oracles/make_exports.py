"""Exports tiny models with fdq, for `check_exports.py` to load with the code that owns the formats.

    python -m tests.oracles.make_exports DIR            # with fdq, from the repository
    oracle-env/bin/python tests/oracles/check_exports.py DIR

For each case there are `DIR/<case>/` and `DIR/<case>-dense/`, the same model decoded to float32,
with fdq's logits of it in `logits.npz`.
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx

import fdq
from fdq import models
from fdq.nn.rotary import RotaryConfig

ORACLES = pathlib.Path(__file__).parent / "models"
WIDE = models.DecoderConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    rms_norm_epsilon=1e-5,
    rotary=RotaryConfig(),
    max_position=256,
    dtype="float32",
)
"""A Llama whose matrices are whole blocks of 128."""
MIXTURE = WIDE.replace(
    model_type="qwen3_moe",
    qk_norm=True,
    moe=models.MoEConfig(num_experts=4, top_k=2, intermediate_size=64, layers=(0, 1)),
)
"""Experts in all layers: GPTQModel expects no dense ones in this family."""

MIXED = {"*.down_proj": "W8A16-f32", "layers.1.self_attn.*": None, "*": "W4A16-g32"}
CASES = {
    # the model, its scheme, the exporter
    "ct-w4": ("llama", "W4A16-g32", "compressed-tensors"),
    "ct-w4-asym": ("llama", "W4A16-g32-asym", "compressed-tensors"),
    "ct-w4-channel": ("qwen2", "W4A16-channel", "compressed-tensors"),
    "ct-w3": ("llama", "W3A16-g32", "compressed-tensors"),
    "ct-w2": ("llama", "W2A16-g32", "compressed-tensors"),
    "ct-w8": ("ernie4_5", "W8A16", "compressed-tensors"),
    "ct-w8a8": ("llama_bias", "W8A8", "compressed-tensors"),
    "ct-w8a8-static": ("llama", "W8A8-static", "compressed-tensors"),
    "ct-w4a8": ("llama", "W4A8-g32", "compressed-tensors"),
    "ct-fp8": ("llama", "Wfp8Afp8", "compressed-tensors"),
    "ct-fp8-static": ("llama", "tensor_wise_fp8", "compressed-tensors"),
    "ct-fp8-block": (WIDE, "Wfp8A16-b128", "compressed-tensors"),
    "ct-mxfp8": ("llama", "WMXFP8A16", "compressed-tensors"),
    "ct-mixed": ("qwen3", MIXED, "compressed-tensors"),
    "ct-moe": ("qwen3_moe", "W4A16-g16-f32", "compressed-tensors"),
    "ct-moe-shared": ("ernie4_5_moe", "W8A16", "compressed-tensors"),
    "ct-cache": ("llama", "W8A8Cfp8-kvhead", "compressed-tensors"),
    "mxfp4": ("llama", "WMXFP4A16", "mxfp4"),
    "nvfp4": ("llama", "WNVFP4A16", "nvfp4"),
    "gptq-w4": (WIDE, "W4A16-g32-f16", "gptq"),
    "gptq-w4-bf16": (WIDE, "W4A16-g32", "gptq"),
    "gptq-w8": (WIDE, "W8A16-g128-f16", "gptq"),
    "gptq-w3": (WIDE, "W3A16-g32-f16", "gptq"),
    "gptq-w2": (WIDE, "W2A16-g32-sym-f16", "gptq"),
    "gptq-w2-half": (WIDE, "W2A16-g32-f16", "gptq"),
    "gptq-channel": (WIDE, "W4A16-channel-f16", "gptq"),
    "gptq_v2-asym": (WIDE, "W4A16-g32-asym-f16", "gptq_v2"),
    "awq-asym": (WIDE, "W4A16-g32-asym-f16", "awq"),
    "awq-sym": (WIDE, "W4A16-g64-f16", "awq"),
    "awq-w2": (WIDE, {"layers.1.self_attn.*": None, "*": "W2A16-g32-f16"}, "awq"),
    "gptq-moe": (MIXTURE, "W4A16-g32-f16", "gptq"),
    "fp8-block": (WIDE, "Wfp8Afp8-b128-x128", "fp8"),
    "fp8-channel": ("llama", "Wfp8Afp8", "fp8"),
    "nf4": ("llama", "WNF4A16-g32-f32", "bitsandbytes"),
    "nf4-double": (WIDE, "WNF4A16-g64-dq", "bitsandbytes"),
    "dense-cc2": (WIDE, "WCC2A16", "dense"),
}


def model(which: str | models.DecoderConfig) -> models.Decoder:
    """A random model in float32."""
    if isinstance(which, str):
        return fdq.load(ORACLES / which, prepare=False)
    return models.Decoder(which, rngs=nnx.Rngs(0))


def export(case: str, folder: pathlib.Path) -> None:
    """Writes one case, its decoded twin and fdq's logits of it."""
    base, scheme, to = CASES[case]
    floats = model(base)
    tokens = np.random.default_rng(0).integers(3, floats.config.vocab_size, (2, 12))
    recipe = fdq.Recipe.parse(scheme if isinstance(scheme, str) else list(scheme.items()))
    calibration = fdq.calibrate(floats, tokens) if recipe.needs_calibration else None
    quantized = fdq.quantize(floats, recipe, calibration=calibration)
    fdq.export(quantized, folder / case, to=to)
    twin = folder / f"{case}-dense"
    fdq.export(quantized, twin, to="dense", dtype="float32")
    logits = np.asarray(fdq.load(twin)(jnp.asarray(tokens, jnp.int32)))
    np.savez(twin / "logits.npz", ids=tokens, logits=logits)


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    target.mkdir(exist_ok=True)
    for one in sys.argv[2:] or CASES:
        export(one, target)
        print(one, flush=True)
