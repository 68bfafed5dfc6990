"""Tiny models of every family with the logits and tokens that transformers gives them."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from fdq import models

ORACLES = pathlib.Path(__file__).parent.parent / "oracles" / "models"
NAMES = sorted(path.name for path in ORACLES.iterdir() if path.is_dir())

GLM4_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def read_config(name, file="config.json"):
    return json.loads((ORACLES / name / file).read_text())


def fill(model, tensors):
    """Puts Hugging Face tensors into a model, and checks that all of both are used."""
    left = dict(tensors)

    def take(*names):
        return np.concatenate([left.pop(name).T for name in names], axis=-1)

    def scale(name):
        """A norm's scale; Gemma stores it less 1."""
        stored = left.pop(name)
        return stored + np.float32(1) if model.config.model_type.startswith("gemma") else stored

    def put(variable, array):
        assert variable.shape == array.shape, (variable.shape, array.shape)
        variable.set_value(jnp.asarray(array, variable.dtype))
        done.append(variable)

    def linear(module, prefix, *names):
        put(module.kernel, take(*(f"{prefix}.{name}.weight" for name in names)))
        if module.bias is not None:
            put(module.bias, take(*(f"{prefix}.{name}.bias" for name in names)))

    def mlp(module, prefix):
        fused = f"{prefix}.gate_up_proj.weight" in left
        names = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        linear(module.gate_up_proj, prefix, *names)
        linear(module.down_proj, prefix, "down_proj")

    def latent(module, prefix):
        for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
            if getattr(module, name) is not None:
                linear(getattr(module, name), prefix, name)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if getattr(module, name) is not None:
                put(getattr(module, name).scale, left.pop(f"{prefix}.{name}.weight"))

    def gpt_oss(block, prefix):
        linear(block.router, prefix, "router")
        for name in ("gate_up_proj", "down_proj"):
            module = getattr(block.experts, name)
            for variable, end in ((module.kernel, ""), (module.bias, "_bias")):
                stored = left.pop(f"{prefix}.experts.{name}{end}")
                if name == "gate_up_proj":
                    stored = np.concatenate([stored[..., ::2], stored[..., 1::2]], axis=-1)
                put(variable, stored)

    done = []
    put(model.embed_tokens.embedding, left.pop("model.embed_tokens.weight"))
    put(model.norm.scale, scale("model.norm.weight"))
    if model.lm_head is not None:
        put(model.lm_head.kernel, take("lm_head.weight"))
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}"
        attention = layer.self_attn
        linear(attention.o_proj, f"{prefix}.self_attn", "o_proj")
        if hasattr(attention, "kv_b_proj"):
            latent(attention, f"{prefix}.self_attn")
        else:
            linear(attention.qkv_proj, f"{prefix}.self_attn", "q_proj", "k_proj", "v_proj")
        if getattr(attention, "q_norm", None) is not None:
            put(attention.q_norm.scale, scale(f"{prefix}.self_attn.q_norm.weight"))
            put(attention.k_norm.scale, scale(f"{prefix}.self_attn.k_norm.weight"))
        if getattr(attention, "sinks", None) is not None:
            put(attention.sinks, left.pop(f"{prefix}.self_attn.sinks"))
        for norm in (name for name in vars(layer) if name.endswith("layernorm")):
            stored = GLM4_NORMS.get(norm, norm) if model.config.model_type == "glm4" else norm
            put(getattr(layer, norm).scale, scale(f"{prefix}.{stored}.weight"))
        block, prefix = layer.mlp, f"{prefix}.mlp"
        if not hasattr(block, "router"):
            mlp(block, prefix)
            continue
        if block.router.bias is not None:
            gpt_oss(block, prefix)
            continue
        put(block.router.kernel, take(f"{prefix}.gate.weight"))
        if block.router.correction_bias is not None:
            names = (f"{prefix}.{room}.e_score_correction_bias" for room in ("moe_statics", "gate"))
            (name,) = (name for name in names if name in left)
            put(block.router.correction_bias, left.pop(name).reshape(-1))
        experts = range(block.experts.down_proj.kernel.shape[0])
        names = [[f"{prefix}.experts.{e}.{n}_proj.weight" for n in ("gate", "up")] for e in experts]
        put(block.experts.gate_up_proj.kernel, np.stack([take(*pair) for pair in names]))
        names = [f"{prefix}.experts.{e}.down_proj.weight" for e in experts]
        put(block.experts.down_proj.kernel, np.stack([take(name) for name in names]))
        if block.shared_experts is not None:
            mlp(block.shared_experts, f"{prefix}.shared_experts")
    assert not left, f"tensors that the model has no place for: {sorted(left)}"
    assert len(done) == len(jax.tree.leaves(model)), "parameters without a tensor"
    return model


def oracle_config(name):
    return models.from_huggingface(read_config(name))


@functools.cache
def oracle(name):
    """(model, expected arrays) of one oracle."""
    model = models.abstract(oracle_config(name))
    expected = dict(np.load(ORACLES / name / "expected.npz"))
    return fill(model, load_file(ORACLES / name / "model.safetensors")), expected


def greedy_batch(expected):
    """The four prompts of an oracle in one batch, right-padded, and what they continue to.

    Returns:
      prompts [4, L] int32, their lengths, 16 greedy tokens of each, and at each of these the gap
      between the two best logits [4, 16].
    """
    prompts, tokens, logits = [], [], []
    for suffix in ("", "_short", "_long"):
        prompts += list(expected["prompt" + suffix])
        tokens += expected["greedy" + suffix].tolist()
        logits += list(expected["greedy_logits" + suffix])
    lengths = list(map(len, prompts))
    padded = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    best = np.sort(np.array(logits), axis=-1)
    return padded, lengths, tokens, best[..., -1] - best[..., -2]
