"""A GGUF's metadata as the config.json that Hugging Face has of the same model, key by key.

Architectures are mapped one by one, as their tensors may be laid out in ways of their own; a key of
an architecture that is not read here may change what a model computes, and is refused.
Source: llama.cpp (`conversion/`, `src/llama-arch.cpp`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fdq.nn.rotary import RotaryConfig, inverse_frequencies
from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers.source_directory import check_sizes

ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
_MOST = 2**31 - 1
_MOST_LAYERS = 256
_NEUTRAL = ("vocab_size", "rope.scaling.finetuned", "expert_shared_feed_forward_length")
_LLAMA3_ORIGINAL = 8192
_SOFTMAX = 1  # of llama.cpp's gating functions


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A `general.architecture`.

    Attributes:
      model_type: the family of fdq.
      read: the keys of its config.json that not all models have.
      permuted: rows of q and k are in the order of GPT-J's rotary.
    """

    model_type: str
    read: Callable[["Metadata"], dict[str, Any]]
    permuted: bool = False


class Metadata:
    """Metadata of one architecture; every key must be read."""

    def __init__(self, path: str, content: Mapping[str, Any], tensors: Mapping[str, tuple]):
        self.path, self.content = path, content
        self.shapes = tensors
        self.architecture = self.text("general.architecture")
        self._read = {f"{self.architecture}.{key}" for key in _NEUTRAL}

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.content.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def get(self, key: str) -> Any:
        """A value of the architecture; None without one."""
        name = f"{self.architecture}.{key}"
        self._read.add(name)
        return self.content.get(name)

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = _MOST) -> int:
        """A whole number; a list with one for each layer counts where all are equal."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        value = default if value is None else value
        if type(value) is not int or not least <= value <= most:
            limits = f"of at least {least}" if most == _MOST else f"in {least}…{most}"
            raise self.wrong(f"{self.architecture}.{key}", f"a whole number {limits}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise self.wrong(f"{self.architecture}.{key}", "a positive number")
        # A float32 as people write it: 1e-5, not 9.99999974e-06.
        return float(str(np.float32(value)))

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuses another value; a missing key is taken as allowed."""
        value = self.get(key)
        if value is not None and (isinstance(value, np.ndarray | list) or value not in allowed):
            raise self.wrong(f"{self.architecture}.{key}", " or ".join(map(repr, allowed)))

    def has(self, tensor: str) -> bool:
        """Whether there is such a tensor."""
        return tensor in self.shapes

    def token(self, name: str) -> int | None:
        """The number of a special token."""
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.content.get(key)
        if value is None or value == 2**32 - 1:
            return None
        if type(value) is not int or not 0 <= value <= _MOST:
            raise self.wrong(key, "the number of a token")
        return value

    def finish(self) -> None:
        """Refuses keys of the architecture that nobody read and that are not off."""
        for key, value in self.content.items():
            is_off = isinstance(value, int | float | str) and not value
            if key.startswith(f"{self.architecture}.") and key not in self._read and not is_off:
                raise CheckpointError(
                    f"{self.path}: metadata {shown(key)} = {_in_a_line(value)} is not known to "
                    "fdq, and may change what the model computes."
                )

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """What to raise about a value."""
        found = _in_a_line(self.content.get(key))
        return CheckpointError(f"{self.path}: metadata {key} = {found}, expected {expected}.")


def huggingface_config(
    metadata: Metadata, rope: Mapping[str, np.ndarray]
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture, and a config.json that `fdq.models.from_huggingface` reads.

    `rope` has those of `ROPE_TENSORS` that are there, float32.
    """
    name = metadata.architecture
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise CheckpointError(
            f"{metadata.path}: architecture {shown(name)} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}. Load or convert the safetensors release of the model."
        )
    if metadata.text("general.type", "model") != "model":
        raise metadata.wrong("general.type", "a model")
    embedding = metadata.shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(
            f"{metadata.path}: tensor 'token_embd.weight' is missing, so it holds no model."
        )
    hidden, heads = metadata.whole("embedding_length"), metadata.whole("attention.head_count")
    head_dim = metadata.whole("attention.key_length", max(1, hidden // heads))
    metadata.must_be("attention.value_length", head_dim)
    metadata.must_be("attention.causal", True)
    stops = [metadata.token(kind) for kind in ("eos", "eot", "eom")]
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.whole("feed_forward_length"),
        "num_hidden_layers": metadata.whole("block_count", most=_MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.whole("context_length"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(metadata, rope, head_dim),
        "tie_word_embeddings": not metadata.has("output.weight"),
        "bos_token_id": metadata.token("bos"),
        "eos_token_id": list(dict.fromkeys(stop for stop in stops if stop is not None)) or None,
        "pad_token_id": metadata.token("padding"),
    }
    rotated = metadata.whole("rope.dimension_count", head_dim)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    check_sizes(config, metadata.path)
    # Before a model of so many layers is built.
    for layer in reversed(range(config["num_hidden_layers"])):
        name = f"blk.{layer}.attn_norm.weight"
        if metadata.shapes.get(name) != (hidden,) or embedding[1] != hidden:
            raise CheckpointError(
                f"{metadata.path}: tensors 'token_embd.weight' and '{name}' are "
                f"{list(embedding)} and {list(metadata.shapes.get(name, ())) or 'missing'}, "
                f"expected rows of {hidden} in all of {config['num_hidden_layers']} layers."
            )
    config |= architecture.read(metadata)
    check_sizes(config, metadata.path)
    metadata.finish()
    return architecture, {key: value for key, value in config.items() if value is not None}


def _in_a_line(value: Any) -> str:
    """A value for an error; arrays print themselves in several lines."""
    return " ".join(repr(value).split())[:80]


def _scaling(
    metadata: Metadata, rope: Mapping[str, np.ndarray], head_dim: int
) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type")
    kind = "none" if kind is None else kind
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn", "longrope"):
        raise metadata.wrong(f"{metadata.architecture}.rope.scaling.type", "none, linear, yarn")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    original = metadata.whole("rope.scaling.original_context_length", least=0, default=0)
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    fast = metadata.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = metadata.number("rope.scaling.yarn_beta_slow", 1.0)
    metadata.must_be("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    metadata.must_be("rope.scaling.yarn_attn_factor", 1.0)
    if ROPE_LONG in rope and ROPE_SHORT in rope:
        return {
            "type": "longrope",
            "short_factor": _list(rope[ROPE_SHORT]),
            "long_factor": _list(rope[ROPE_LONG]),
            "original_max_position_embeddings": original or metadata.whole("context_length"),
            "attention_factor": attention,
        }
    if attention != 1.0:
        raise metadata.wrong(f"{metadata.architecture}.rope.scaling.attn_factor", "1")
    if ROPE_FREQS in rope:
        if kind != "none":
            raise metadata.wrong(
                f"{metadata.architecture}.rope.scaling.type", f"none beside tensor {ROPE_FREQS}"
            )
        theta = metadata.number("rope.freq_base", 10000.0)
        return _by_factors(rope[ROPE_FREQS], theta, head_dim, original, metadata)
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or metadata.whole("context_length"),
            "beta_fast": fast,
            "beta_slow": slow,
        }
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None


def _by_factors(
    factors: np.ndarray, theta: float, head_dim: int, original: int, metadata: Metadata
) -> dict[str, Any]:
    """What divides each frequency: Llama 3's formula where it gives these numbers."""
    if factors.shape == (head_dim // 2,):
        plain = inverse_frequencies(RotaryConfig(theta=theta), head_dim)
        llama3: dict[str, Any] = {
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        for length in (original, _LLAMA3_ORIGINAL) if original else (_LLAMA3_ORIGINAL,):
            named = RotaryConfig(
                theta=theta, rope_type="llama3", original_max_position=length, **llama3
            )
            if np.allclose(
                plain / factors, inverse_frequencies(named, head_dim), rtol=1e-5, atol=0
            ):
                return {
                    "rope_type": "llama3",
                    **llama3,
                    "original_max_position_embeddings": length,
                }
    return {
        "type": "longrope",
        "short_factor": _list(factors),
        "long_factor": _list(factors),
        "original_max_position_embeddings": max(2, metadata.whole("context_length")),
        "attention_factor": 1.0,
    }


def _list(factors: np.ndarray) -> list[float]:
    return [float(str(factor)) for factor in factors]


def _llama(metadata: Metadata) -> dict[str, Any]:
    """Mistral is Llama with a sliding window; experts (Mixtral) are not read."""
    metadata.must_be("expert_count", 0)
    metadata.must_be("expert_used_count", 0)
    biases = {
        "attention_bias": metadata.has("blk.0.attn_q.bias"),
        "mlp_bias": metadata.has("blk.0.ffn_gate.bias"),
    }
    window = metadata.whole("attention.sliding_window", 0, least=0)
    if window and not any(biases.values()):
        return {"model_type": "mistral", "sliding_window": window}
    metadata.must_be("attention.sliding_window", 0)
    return biases


def _qwen3(metadata: Metadata) -> dict[str, Any]:
    return {"attention_bias": metadata.has("blk.0.attn_q.bias")}


def _experts(metadata: Metadata) -> dict[str, Any]:
    metadata.must_be("expert_gating_func", _SOFTMAX)
    metadata.must_be("expert_weights_scale", 1.0)
    metadata.must_be("expert_weights_norm", True)
    return {
        "num_experts": metadata.whole("expert_count"),
        "num_experts_per_tok": metadata.whole("expert_used_count"),
        "moe_intermediate_size": metadata.whole("expert_feed_forward_length"),
    }


def _qwen3_moe(metadata: Metadata) -> dict[str, Any]:
    layers = range(metadata.whole("block_count"))
    dense = [i for i in layers if not metadata.has(f"blk.{i}.ffn_gate_inp.weight")]
    # llama.cpp, which has no key for it, always does.
    fixed = {"norm_topk_prob": True, "mlp_only_layers": dense}
    return {**_qwen3(metadata), **_experts(metadata), **fixed}


def _ernie(metadata: Metadata) -> dict[str, Any]:
    return {"use_bias": metadata.has("blk.0.attn_q.bias")}


def _ernie_moe(metadata: Metadata) -> dict[str, Any]:
    experts = _experts(metadata)
    layers = range(metadata.whole("block_count"))
    return {
        "moe_num_experts": experts["num_experts"],
        "moe_k": experts["num_experts_per_tok"],
        "moe_intermediate_size": experts["moe_intermediate_size"],
        "moe_layer_start_index": metadata.whole("leading_dense_block_count", 0, least=0),
        "moe_layer_interval": metadata.whole("interleave_moe_layer_step", 1),
        "moe_num_shared_experts": metadata.whole("expert_shared_count", 0, least=0),
        "moe_use_aux_free": any(metadata.has(f"blk.{i}.exp_probs_b.bias") for i in layers),
    }


def _phi3(metadata: Metadata) -> dict[str, Any]:
    window = metadata.whole("attention.sliding_window", 0, least=0)
    original = metadata.whole("rope.scaling.original_context_length", 0, least=0)
    return {
        "sliding_window": window or None,
        "original_max_position_embeddings": original or None,
    }


def _plain(metadata: Metadata) -> dict[str, Any]:
    del metadata
    return {}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _llama, permuted=True),
    "qwen2": Architecture("qwen2", _plain),
    "qwen3": Architecture("qwen3", _qwen3),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe),
    "ernie4_5": Architecture("ernie4_5", _ernie),
    "ernie4_5-moe": Architecture("ernie4_5_moe", _ernie_moe),
    "phi3": Architecture("phi3", _phi3),
}
