"""adapter_config.json: what it says of ranks and factors, and what is refused."""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.source_directory import MAX_CONFIG_BYTES

# Keys that say nothing about the mathematics of adapters that are there, or nothing by themselves.
_NEUTRAL = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "qalora_group_size", "runtime_config"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),  # how it all began
)
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias")
# Beginnings after which the base is another: the adapters belong to what is left of it.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
_KINDS = {
    "use_dora": "DoRA, whose magnitudes fdq does not have",
    "modules_to_save": "whole layers that were trained beside the adapters",
    "target_parameters": "adapters of parameters that are no linear layers",
    "trainable_token_indices": "trained tokens beside the adapters",
    "layer_replication": "layers that are there several times",
    "lora_bias": "adapters with biases",
    "fan_in_fan_out": "weights stored [in, out]",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What adapter_config.json says of ranks and factors."""

    path: pathlib.Path
    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Settings":
        """CheckpointError for other adapters than plain LoRA of linear layers."""
        config = strict_json.read_object(path, max_bytes=MAX_CONFIG_BYTES)
        kind = config.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{path}: peft_type {shown(str(kind))}, expected 'LORA'.")
        start = config.get("init_lora_weights", True)
        if not any(start is one or start == one for one in _INITIAL):
            raise CheckpointError(
                f"{path}: init_lora_weights {shown(str(start))} changed the weights of the model. "
                "Save the adapters with PEFT's path_initial_model_for_weight_conversion, which "
                "turns them into those of the original."
            )
        if config.get("bias", "none") != "none":
            raise CheckpointError(
                f"{path}: bias {shown(str(config['bias']))}: biases of the model were trained "
                "too. Merge the adapters with PEFT (merge_and_unload), and load the result."
            )
        for key, found in config.items():
            if found in (None, False, [], {}) or key in (*_NEUTRAL, *_READ, "init_lora_weights"):
                continue
            what = _KINDS.get(key, "which fdq does not know")
            raise CheckpointError(
                f"{path}: {key} {shown(str(found))}: {what}. Merge the adapters with PEFT "
                "(merge_and_unload), and load the result."
            )
        stabilized = config.get("use_rslora", False)
        if not isinstance(stabilized, bool):
            raise CheckpointError(f"{path}: use_rslora {shown(str(stabilized))}, expected a flag.")
        return cls(
            path,
            _positive(path, "r", config.get("r", 8)),
            _finite(path, "lora_alpha", config.get("lora_alpha", 8)),
            stabilized,
            _patterns(path, config, "rank_pattern", _positive),
            _patterns(path, config, "alpha_pattern", _finite),
        )

    def of(self, name: str) -> tuple[int, float]:
        """The rank of a layer's adapter, and the alpha whose `alpha / rank` is its factor."""
        rank = _by_pattern(self.ranks, name, self.rank)
        alpha = _by_pattern(self.alphas, name, self.alpha)
        return rank, alpha * math.sqrt(rank) if self.rank_stabilized else alpha


def _positive(path: pathlib.Path, key: str, found: Any) -> int:
    if type(found) is not int or not 1 <= found <= 2**20:
        raise CheckpointError(f"{path}: {key} {shown(str(found))}, expected a whole number >= 1.")
    return found


def _finite(path: pathlib.Path, key: str, found: Any) -> float:
    if type(found) not in (int, float) or not abs(found) < 1e30:
        raise CheckpointError(f"{path}: {key} {shown(str(found))}, expected a number.")
    return float(found)


def _patterns(path: pathlib.Path, config: Mapping[str, Any], key: str, check: Any) -> dict:
    """Names of layers and their numbers. PEFT's are regular expressions, of which these are all."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {key} is no object.")
    for name in found:
        if not re.fullmatch(r"\^?[A-Za-z0-9_.]+", name):
            raise CheckpointError(
                f"{path}: {key}: {shown(name)} is a regular expression; expected a layer's name."
            )
    return {name: check(path, f"{key}: {shown(name)}", number) for name, number in found.items()}


def _by_pattern[T](patterns: Mapping[str, T], name: str, default: T) -> T:
    """The first that is the name or its end; PEFT lets anything come before a dot."""
    for pattern, found in patterns.items():
        whole = pattern.removeprefix("^")
        if name == whole or (whole == pattern and name.endswith(f".{pattern}")):
            return found
    return default


def config_of(
    of_model: bool,
    base: str | None,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    every: Iterable[str],
) -> dict[str, Any]:
    """What most adapters have, and patterns for the others; `every` layer of the model counts."""
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    words = {name.rpartition(".")[2] for name in ranks}
    # Short names where they mean these layers alone.
    short = all(name in ranks for name in every if name.rpartition(".")[2] in words)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if of_model else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": sorted(words if short else ranks),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: _number(a) for name, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _number(x: float) -> int | float:
    return int(x) if x == int(x) else x
