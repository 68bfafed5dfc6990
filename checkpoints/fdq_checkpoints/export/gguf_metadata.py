"""What a GGUF says of a model besides its tensors: sizes, rotary positions, the tokenizer."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdq import models
from fdq.models import DecoderConfig, MoEConfig
from fdq.nn.rotary import RotaryConfig, inverse_frequencies
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.sources import gguf_config, gguf_tokenizer

_MAX_TOKENIZER_BYTES = 2**28
_LLAMA3_ORIGINAL = 8192
_UNUSED = 5
_FREE = {"model_type", "rotary", "dtype", "bos_token_id", "eos_token_ids", "pad_token_id"}


def architecture_of(model_type: str, where: str) -> str:
    """The name of a family in GGUF."""
    known = {one.model_type: name for name, one in gguf_config.ARCHITECTURES.items()}
    known["mistral"] = "llama"
    if model_type not in known:
        raise CheckpointError(
            f"{where}: {model_type} has no architecture in GGUF that fdq knows; known are "
            f"{', '.join(known)}. --to dense writes safetensors."
        )
    return known[model_type]


def of_config(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """The metadata of an architecture, by keys without its name."""
    rotary, windows = config.rotary, set(config.sliding_windows[: config.num_layers])
    said: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_epsilon,
        "rope.dimension_count": rotary.rotated(config.head_dim),
        "rope.freq_base": rotary.theta,
        "vocab_size": config.vocab_size,
    }
    if rotary.rope_type in ("linear", "yarn"):
        said["rope.scaling.type"] = rotary.rope_type
        said["rope.scaling.factor"] = rotary.factor
    if rotary.rope_type in ("yarn", "longrope", "llama3"):
        said["rope.scaling.original_context_length"] = rotary.original_max_position
    if rotary.rope_type == "yarn":
        said["rope.scaling.yarn_beta_fast"] = rotary.beta_fast
        said["rope.scaling.yarn_beta_slow"] = rotary.beta_slow
    if rotary.rope_type == "longrope":
        said["rope.scaling.attn_factor"] = rotary.scale
    if len(windows) == 1 and None not in windows:
        said["attention.sliding_window"] = windows.pop()
    if isinstance(config.moe, MoEConfig):
        said |= _of_experts(config.moe, architecture)
    return {f"{architecture}.{key}": value for key, value in said.items()}


def _of_experts(moe: MoEConfig, architecture: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.intermediate_size,
    }
    if architecture == "ernie4_5-moe":
        steps = {b - a for a, b in zip(moe.layers, moe.layers[1:], strict=False)}
        said["leading_dense_block_count"] = moe.layers[0] if moe.layers else 0
        said["interleave_moe_layer_step"] = steps.pop() if len(steps) == 1 else 1
        said["expert_shared_count"] = moe.shared_intermediate_size // moe.intermediate_size
        if moe.shared_intermediate_size:
            said["expert_shared_feed_forward_length"] = moe.shared_intermediate_size
    return said


def rope_tensors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """What frequencies are divided by, where a formula's name does not say it: float32 vectors."""
    rotary = config.rotary
    if rotary.rope_type == "llama3":
        plain = dataclasses.replace(rotary, rope_type="default")
        plain, own = (inverse_frequencies(one, config.head_dim) for one in (plain, rotary))
        return {gguf_config.ROPE_FREQS: (plain / own).astype(np.float32)}
    if rotary.rope_type != "longrope":
        return {}
    long, short = (np.asarray(x, np.float32) for x in (rotary.long_factor, rotary.short_factor))
    # Only Phi-3 has two sets of them.
    if config.model_type != "phi3" and np.array_equal(long, short):
        return {gguf_config.ROPE_FREQS: long}
    return {gguf_config.ROPE_LONG: long, gguf_config.ROPE_SHORT: short}


def check(
    where: str,
    config: DecoderConfig,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope: Mapping[str, np.ndarray],
) -> None:
    """CheckpointError unless what is written is read as the same model; names what is not."""
    try:
        said = gguf_config.Metadata(where, metadata, shapes)
        read = models.from_huggingface(gguf_config.huggingface_config(said, rope)[1])
    except ValueError as error:
        raise CheckpointError(
            f"{where}: GGUF cannot say what this model is: {error} --to dense writes safetensors."
        ) from error
    for field in dataclasses.fields(config):
        found, meant = getattr(read, field.name), getattr(config, field.name)
        if field.name not in _FREE and _plain(found) != _plain(meant):
            raise CheckpointError(
                f"{where}: GGUF has no word for {field.name}={meant!r:.120} of this architecture. "
                "--to dense writes safetensors."
            )
    if not _same_rotary(read.rotary, config.rotary, config.head_dim):
        raise CheckpointError(
            f"{where}: GGUF has no word for {config.rotary!r:.200}. --to dense writes safetensors."
        )


def _plain(value: Any) -> Any:
    """A field such that equal meanings are equal: no windows; numbers as float32."""
    if isinstance(value, tuple) and set(value) <= {None}:
        return ()
    return np.float32(value) if isinstance(value, float) else value


def _same_rotary(one: RotaryConfig, other: RotaryConfig, head_dim: int) -> bool:
    fields = ("interleaved", "scale")
    if any(getattr(one, x) != getattr(other, x) for x in fields):
        return False
    if "dynamic" in (one.rope_type, other.rope_type):
        return False
    for long in (False, True):
        a, b = (inverse_frequencies(x, head_dim, long=long) for x in (one, other))
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-5, atol=0):
            return False
    return True


def of_special_tokens(config: DecoderConfig) -> dict[str, int]:
    """The numbers of the tokens that begin, end and fill up a text."""
    stops = zip(("eos", "eot", "eom"), config.eos_token_ids, strict=False)
    ids = {"bos": config.bos_token_id, **dict(stops), "padding": config.pad_token_id}
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}


class NoTokenizer(Exception):
    """Why a file has none."""


def of_tokenizer(
    files: Sequence[pathlib.Path], config: DecoderConfig, architecture: str
) -> dict[str, Any]:
    """The metadata of a tokenizer.json and what is beside it; NoTokenizer where that is none."""
    by_name = {file.name: file for file in files}
    if "tokenizer.json" not in by_name:
        raise NoTokenizer("there is no tokenizer.json")
    content, said = (
        strict_json.read_object(by_name[name], max_bytes=_MAX_TOKENIZER_BYTES)
        if name in by_name
        else {}
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    try:
        found = gguf_tokenizer.metadata_of(content, config.vocab_size, architecture)
    except gguf_tokenizer.Unusable as reason:
        raise NoTokenizer(str(reason)) from None
    numbers = {token: i for i, token in enumerate(found["tokenizer.ggml.tokens"])}
    named = of_special_tokens(config)
    for name, key in (("bos", "bos"), ("padding", "pad"), ("unknown", "unk"), ("eos", "eos")):
        spelled, place = said.get(f"{key}_token"), f"tokenizer.ggml.{name}_token_id"
        spelled = spelled.get("content") if isinstance(spelled, dict) else spelled
        if place not in named and isinstance(spelled, str) and spelled in numbers:
            found[place] = numbers[spelled]
    if isinstance(said.get("add_bos_token"), bool):
        found["tokenizer.ggml.add_bos_token"] = said["add_bos_token"]
    else:
        processor = json.dumps(content.get("post_processor"))
        first = next((t for t in (said.get("bos_token"),) if isinstance(t, str)), None)
        found["tokenizer.ggml.add_bos_token"] = first is not None and first in processor
    template = said.get("chat_template")
    if "chat_template.jinja" in by_name:
        template = by_name["chat_template.jinja"].read_text("utf-8")
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return found
