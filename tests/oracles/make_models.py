"""Makes `models/<name>/`: tiny random float32 models with the logits that transformers gives them.

    python make_models.py                 # all models
    python make_models.py qwen3 llama     # some of them
    python make_models.py --check         # only reload and verify what is there

Every parameter is random, norms and biases too, with a spread that keeps attention, routing and
logits far from uniform. A seed is kept only if greedy decoding and expert selection are well
posed: no step may hang on a difference smaller than `MIN_MARGIN`.
"""

import argparse
import contextlib
import json
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
MIN_MARGIN = 1e-3
MIN_ROUTE_MARGIN = 3e-4
LOGITS_LENGTH, GREEDY_STEPS = 24, 16
PROMPTS = {"": (2, 8), "_short": (1, 5), "_long": (1, 13)}  # suffix -> [batch, prompt length]

COMMON = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LATENT = COMMON | {
    "hidden_size": 32,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that 24 positions already see the rescaled bands
}

MODELS = {
    "ernie4_5": transformers.Ernie4_5Config(
        **COMMON, vocab_size=96, num_hidden_layers=2, intermediate_size=96, head_dim=32
    ),
    "ernie4_5_bias": transformers.Ernie4_5Config(
        **COMMON,
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=96,
        head_dim=16,
        use_bias=True,
        tie_word_embeddings=False,
    ),
    "ernie4_5_moe": transformers.Ernie4_5_MoeConfig(
        **COMMON,
        vocab_size=96,
        num_hidden_layers=3,
        intermediate_size=96,
        moe_intermediate_size=16,
        moe_num_experts=8,
        moe_k=3,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
    ),
    "ernie4_5_moe_untied": transformers.Ernie4_5_MoeConfig(
        **COMMON,
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=64,
        moe_intermediate_size=32,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=0,
        moe_layer_start_index=1,
        tie_word_embeddings=False,
    ),
    "gemma2": transformers.Gemma2Config(
        **COMMON | {"hidden_size": 48},
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=64,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=6,
        attn_logit_softcapping=1.5,  # both bend what they cap
        final_logit_softcapping=2.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **COMMON | {"hidden_size": 48},
        vocab_size=96,
        num_hidden_layers=3,
        intermediate_size=64,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    ),
    "gpt_oss": transformers.GptOssConfig(
        **COMMON | {"hidden_size": 32},
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=24,
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=6,
        swiglu_limit=1.5,  # which some reach
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    ),
    "glm": transformers.GlmConfig(
        **COMMON | {"hidden_size": 32},
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=48,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "glm4": transformers.Glm4Config(
        **COMMON | {"hidden_size": 32},
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=48,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "granite": transformers.GraniteConfig(
        **COMMON | {"hidden_size": 32},
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=48,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.25,
        logits_scaling=2.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "seed_oss": transformers.SeedOssConfig(
        **COMMON | {"hidden_size": 32},
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=48,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "smollm3": transformers.SmolLM3Config(
        **COMMON | {"hidden_size": 32},
        vocab_size=96,
        num_hidden_layers=3,
        intermediate_size=48,
        no_rope_layers=[1, 0, 1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama": transformers.LlamaConfig(
        **COMMON,
        vocab_size=112,
        num_hidden_layers=2,
        intermediate_size=96,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3_ROPE,
    ),
    "llama_bias": transformers.LlamaConfig(
        **COMMON,
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=96,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "qwen2": transformers.Qwen2Config(
        **COMMON,
        vocab_size=128,
        num_hidden_layers=2,
        intermediate_size=96,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen2_window": transformers.Qwen2Config(
        **COMMON,
        vocab_size=96,
        num_hidden_layers=3,
        intermediate_size=64,
        use_sliding_window=True,
        sliding_window=6,  # shorter than every greedy path, and than two of the three prompts
        max_window_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen3": transformers.Qwen3Config(
        **COMMON,
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=64,
        head_dim=32,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **COMMON,
        vocab_size=96,
        num_hidden_layers=3,
        intermediate_size=64,
        head_dim=16,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen3_moe_nonorm": transformers.Qwen3MoeConfig(
        **COMMON,
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=64,
        head_dim=32,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **LATENT,
        vocab_size=96,
        num_hidden_layers=3,
        intermediate_size=48,
        q_lora_rank=24,
        first_k_dense_replace=1,
        moe_intermediate_size=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,  # so that both cosines and scores are scaled
            "original_max_position_embeddings": 32,
        },
    ),
    "deepseek_v3_plain": transformers.DeepseekV3Config(
        **LATENT,
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=32,
        q_lora_rank=None,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        attention_bias=True,
        rope_interleave=False,
        rms_norm_eps=1e-3,  # not that of the norms of latents
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v2": transformers.DeepseekV2Config(
        **LATENT,
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=48,
        q_lora_rank=24,
        first_k_dense_replace=1,
        moe_intermediate_size=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=4.0,
        n_shared_experts=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "glm4_moe_lite": transformers.Glm4MoeLiteConfig(
        **LATENT | {"v_head_dim": 24},  # wider than keys
        vocab_size=96,
        num_hidden_layers=3,
        intermediate_size=32,
        q_lora_rank=12,
        mlp_layer_types=["dense", "sparse", "dense"],
        moe_intermediate_size=8,
        n_routed_experts=6,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "glm4_moe": transformers.Glm4MoeConfig(
        **COMMON | {"hidden_size": 48},
        vocab_size=96,
        num_hidden_layers=2,
        intermediate_size=48,
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        first_k_dense_replace=1,
        moe_intermediate_size=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
}


def randomize(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Overwrites every parameter of `model`; the spread depends on what the parameter does."""
    biases = [item for item in model.named_buffers() if "e_score_correction_bias" in item[0]]
    for name, parameter in [*model.named_parameters(), *biases]:
        value = rng.standard_normal(tuple(parameter.shape))
        if "e_score_correction_bias" in name:
            value *= 0.15
        elif name.endswith("sinks"):
            pass
        elif "norm" in name and model.config.model_type.startswith("gemma"):
            # 1 is added; what is added to the residual must outweigh the scaled embeddings, or
            # each token is followed by itself.
            value = 0.25 * value + (1.0 if "post_" in name else 0.0)
        elif "embed_tokens" in name or "lm_head" in name:
            value *= 0.12 if model.config.model_type.startswith("gemma") else 0.35
        elif "norm" in name:
            value = 1.0 + 0.25 * value
        elif name.endswith("bias"):
            value *= 0.3
        elif name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            value *= 1.5 / np.sqrt(parameter.shape[-1])
        elif model.config.model_type == "gpt_oss" and ".experts." in name:
            value *= 1.3 / np.sqrt(parameter.shape[-2])  # stored [in, out]
        else:
            value *= 1.3 / np.sqrt(parameter.shape[-1])
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value.astype(np.float32)))


@contextlib.contextmanager
def route_margins(model: torch.nn.Module) -> Iterator[list[float]]:
    """Yields a list that collects, per router call, the smallest gap at the top-k boundary."""
    margins: list[float] = []

    def hook(router, args, output):
        logits = output[0].float()
        bias = getattr(router, "e_score_correction_bias", None)
        score = torch.softmax(logits, dim=-1) if bias is None else logits.sigmoid() + bias
        if hasattr(router, "moe_statics"):
            score = score + router.moe_statics.e_score_correction_bias.reshape(1, -1)
        if (getattr(router, "num_group", None) or 1) > 1:
            groups = score.reshape(len(score), router.num_group, -1)
            best = groups.topk(1 if bias is None else 2, dim=-1).values.sum(-1)
            kept = best.sort(dim=-1, descending=True)
            edge = kept.values[:, router.topk_group - 1 : router.topk_group + 1]
            margins.append(float((edge[:, 0] - edge[:, 1]).min()))
            mask = torch.ones_like(best).scatter(1, kept.indices[:, : router.topk_group], 0)
            score = groups.masked_fill(mask.bool()[..., None], -1).flatten(1)
        ordered = score.sort(dim=-1, descending=True).values
        margins.append(float((ordered[:, router.top_k - 1] - ordered[:, router.top_k]).min()))

    routers = [
        m
        for n, m in model.named_modules()
        if n.endswith(("mlp.gate", "mlp.router")) and hasattr(m, "top_k")
    ]
    handles = [m.register_forward_hook(hook) for m in routers]
    yield margins
    for handle in handles:
        handle.remove()


def expected(model: transformers.PreTrainedModel, rng: np.random.Generator) -> dict:
    """Runs the model: logits without a cache, greedy tokens and their logits with one."""
    vocab = model.config.vocab_size
    input_ids = rng.integers(3, vocab, (2, LOGITS_LENGTH))
    arrays = {"input_ids": input_ids.astype(np.int32)}
    margin = np.inf
    with torch.no_grad(), route_margins(model) as routes:
        arrays["logits"] = model(torch.from_numpy(input_ids), use_cache=False).logits.numpy()
        for suffix, shape in PROMPTS.items():
            prompt = rng.integers(3, vocab, shape)
            run = model.generate(
                torch.from_numpy(prompt),
                attention_mask=torch.ones(shape, dtype=torch.int64),
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
                max_new_tokens=GREEDY_STEPS,
                return_dict_in_generate=True,
                output_logits=True,
            )
            greedy_logits = torch.stack(run.logits, dim=1)
            top2 = greedy_logits.topk(2, dim=-1).values
            margin = min(margin, float((top2[..., 0] - top2[..., 1]).min()))
            arrays["prompt" + suffix] = prompt.astype(np.int32)
            arrays["greedy" + suffix] = run.sequences[:, shape[1] :].numpy().astype(np.int32)
            arrays["greedy_logits" + suffix] = greedy_logits.numpy()
    arrays["margin"] = np.float32(margin)
    arrays["route_margin"] = np.float32(min(routes, default=np.inf))
    return arrays


def old_spelling(config: dict) -> dict:
    """The keys that transformers 4 wrote and that most published checkpoints still carry."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config["transformers_version"] = "4.57.0"
    return config


def make(name: str) -> None:
    """Writes `models/<name>/{config.json, model.safetensors, expected.npz}`."""
    folder = HERE / "models" / name
    for attempt in range(100):
        rng = np.random.default_rng([zlib.crc32(name.encode()), attempt])
        model = transformers.AutoModelForCausalLM.from_config(
            MODELS[name], dtype=torch.float32, attn_implementation="eager"
        ).eval()
        randomize(model, rng)
        arrays = expected(model, rng)
        if arrays["margin"] > MIN_MARGIN and arrays["route_margin"] > MIN_ROUTE_MARGIN:
            break
    else:
        raise RuntimeError(f"{name}: no well-posed seed in 100")
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)
    old = json.dumps(old_spelling(model.config.to_diff_dict()), indent=2, sort_keys=True)
    (folder / "config_v4.json").write_text(old + "\n")
    np.savez_compressed(folder / "expected.npz", **arrays)
    print(f"{name}: attempt {attempt}")


def same_meaning(a: transformers.PreTrainedConfig, b: transformers.PreTrainedConfig) -> bool:
    """Whether two configs agree in everything but the version that wrote them."""
    ignore = ("transformers_version", "architectures", "_name_or_path")
    a, b = ({k: v for k, v in c.to_dict().items() if k not in ignore} for c in (a, b))
    return a == b


def check(name: str) -> None:
    """Reloads one model from its files and compares it with its `expected.npz`."""
    folder = HERE / "models" / name
    arrays = dict(np.load(folder / "expected.npz"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, f"{name}: {parameter_name} is not random"
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["input_ids"]).long(), use_cache=False).logits.numpy()
        np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=2e-5)
        for suffix in PROMPTS:  # the greedy path again, without a cache
            prompt, greedy = arrays["prompt" + suffix], arrays["greedy" + suffix]
            ids = torch.from_numpy(np.concatenate([prompt, greedy], axis=1)).long()
            again = model(ids, use_cache=False).logits[:, prompt.shape[1] - 1 : -1].numpy()
            np.testing.assert_array_equal(again.argmax(-1), greedy)
            np.testing.assert_allclose(again, arrays["greedy_logits" + suffix], rtol=0, atol=5e-5)
        for router in model.modules():
            held = getattr(router, "moe_statics", router)
            if not hasattr(held, "e_score_correction_bias"):
                continue
            held.e_score_correction_bias.zero_()
            unbiased = model(torch.from_numpy(arrays["input_ids"]).long()).logits.numpy()
            assert abs(unbiased - logits).max() > 0.1, f"{name}: correction bias has no effect"
        if getattr(model.config, "sliding_window", None):
            full = type(model.config).from_dict(model.config.to_dict() | {"sliding_window": 256})
            unlimited = type(model)(full).eval()
            unlimited.load_state_dict(model.state_dict())
            ids = torch.from_numpy(arrays["input_ids"]).long()
            change = np.abs(unlimited(ids, use_cache=False).logits.numpy() - logits)
            assert change[:, : model.config.sliding_window].max() < 1e-4, (
                f"{name}: its first window"
            )
            assert change.max() > 0.1, f"{name}: the sliding window has no effect"
    old = json.loads((folder / "config_v4.json").read_text())
    new = transformers.AutoConfig.from_pretrained(folder)
    assert same_meaning(type(new).from_dict(old), new), f"{name}: config_v4.json differs"
    assert len(np.unique(arrays["greedy"])) > 4, f"{name}: greedy output repeats itself"
    size = sum(f.stat().st_size for f in folder.iterdir())
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    print(
        f"{name:20s} {kind:13s} {size / 1000:6.0f} kB  logits std {logits.std():.2f}"
        f"  margin {arrays['margin']:.4f}  route margin {arrays['route_margin']:.5f}"
        f"  distinct greedy {len(np.unique(arrays['greedy']))}"
    )


def main() -> None:
    """Makes (unless `--check`) and verifies the named models, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="name")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in options.names:
        if not options.check:
            make(name)
        check(name)


if __name__ == "__main__":
    main()
