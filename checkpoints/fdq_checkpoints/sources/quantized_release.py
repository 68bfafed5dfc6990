"""What other tools' quantized checkpoints say of themselves: which tool, and how many bits.

Their codes are not read here.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.safetensors_reader import TensorInfo
from fdq_checkpoints.readers.source_directory import MAX_CONFIG_BYTES

# By quant_method: the name that people know.
_NAMES = {
    "gptq": "GPTQ",
    "gptq_marlin": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "modelopt": "ModelOpt",
    "nvfp4": "NVFP4",
    "torchao": "torchao",
    "hqq": "HQQ",
    "mlx": "MLX",
    "gemma": "Gemma",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "quip": "QuIP#",
    "vptq": "VPTQ",
    "wint8": "FastDeploy WINT8",
    "wint4": "FastDeploy WINT4",
    "wint2": "FastDeploy WINT2",
    "mix_quant": "FastDeploy MixQuant",
    "block_wise_fp8": "FastDeploy FP8",
}
# Of config.json; the second is what compressed-tensors used to write.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_MLX_KEY = "quantization"
SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# What both may say, by all names of it.
_SAID_TWICE = (
    ("bits", "w_bit"),
    ("group_size", "q_group_size"),
    ("desc_act",),
    ("sym",),
    ("quant_algo",),
    ("kv_cache_quant_algo",),
)
# Formats that are the same thing in fdq, and the integers' groups that it has.
_SCHEMES = {
    "mxfp8": "WMXFP8A16",
    "fp8": "Wfp8A16",
    "mxfp4": "WMXFP4A16",
    "nvfp4": "WNVFP4A16",
    "nf4": "WNF4A16",
}
_INTEGERS = (2, 3, 4, 8)
_LONGEST_TEXT = 10_000
_GROUPS = (16, 32, 64, 128)

# Ends of tensor names: arrays of codes, and what comes with them and is no weight.
_CODES = ("qweight", "quant_weight", "weight_packed", "_blocks", ".weight")
_BESIDE = (
    *(
        "qzeros",
        "scales",
        "biases",
        "g_idx",
        "SCB",
        "weight_format",
        "absmax",
        "quant_map",
        "weight_shape",
    ),
    *("_scale", "_scale_inv", "_scale_2", "_zero_point", "_global_scale", "input_scale"),
)


@dataclasses.dataclass(frozen=True)
class QuantizedRelease:
    """A quantized checkpoint of another tool.

    Attributes:
      method: its `quant_method`.
      tool: the name that people know.
      bits: of a code; None where the config does not say.
      kind: `"int"`, or the name of a format that is no integer.
      group: rows or columns that share a scale; None where a channel or a tensor does.
      where: the file that says so.
      content: what it says.
    """

    method: str
    tool: str
    bits: int | None
    kind: str
    group: int | None
    where: str
    content: Mapping[str, Any] = dataclasses.field(repr=False, hash=False)

    @classmethod
    def of(cls, folder: pathlib.Path, config: Mapping[str, Any]) -> "QuantizedRelease | None":
        """What config.json, or a file beside it, says; None for a model of floats."""
        for key in QUANTIZATION_KEYS:
            content = config.get(key)
            if isinstance(content, dict) and "quant_method" not in content:
                content = _of_mlx(config.get(_MLX_KEY)) or _of_mlx(content) or content
            if content is not None:
                where = f"{folder / 'config.json'}: {key}"
                known = (
                    {"quant_method": "compressed-tensors"} if key != QUANTIZATION_KEYS[0] else {}
                )
                return cls._read(known | (content if isinstance(content, dict) else {}), where)
        if content := _of_mlx(config.get(_MLX_KEY)):
            return cls._read(content, f"{folder / 'config.json'}: {_MLX_KEY}")
        for name in SIDE_FILES:
            path = folder / name
            if os.path.lexists(path):
                content = strict_json.read_object(path, max_bytes=MAX_CONFIG_BYTES)
                inner = content.get("quantization")
                fallback = "modelopt" if name == "hf_quant_config.json" else "gptq"
                values = inner if isinstance(inner, dict) else content
                return cls._read({"quant_method": fallback} | values, str(path))
        return None

    @classmethod
    def unnamed(
        cls, folder: pathlib.Path, tensors: Iterable[TensorInfo]
    ) -> "QuantizedRelease | None":
        """Of a directory whose config says nothing: what its tensors are; None if they are floats.

        There is no other reason for matrices of integers, or of floats of 8 bits.
        """
        codes = [
            info.name
            for info in tensors
            if len(info.shape) > 1 and (info.dtype.kind in "iu" or info.dtype.itemsize == 1)
        ]
        tool = "HQQ" if any(name.endswith(".W_q") for name in codes) else "an unknown tool"
        return cls("?", tool, None, "int", None, str(folder), {}) if codes else None

    @classmethod
    def _read(cls, content: Mapping[str, Any], where: str) -> "QuantizedRelease":
        named = content.get("quant_method", content.get("quantization"))
        method = named if isinstance(named, str) else "?"
        if len(method) > 40 or not method.isprintable():
            method = shown(method[:40])  # nobody's; it stands in messages
        tool = _NAMES.get(method.lower(), shown(method))
        inner = _weights_of_groups(content) or _of_hqq(content) or content
        text = " ".join(
            str(content.get(key, "")).lower()
            for key in (
                *("quant_algo", "format", "fmt", "bnb_4bit_quant_type", "quant_method", "mode"),
            )
        )
        text += f" {inner.get('type', '')}"
        bits = _first_int(inner, ("num_bits", "bits", "w_bit", "wbits", "nbits"))
        kind = next((name for name in _SCHEMES if name in text), "int")
        if kind == "int" and inner.get("type") == "float" and bits == 8:
            kind = "fp8"
        if bits is None:
            bits = {"fp8": 8, "mxfp8": 8, "mxfp4": 4, "nvfp4": 4, "nf4": 4}.get(kind)
        if content.get("load_in_4bit") is True:
            bits = 4
        elif content.get("load_in_8bit") is True:
            bits, kind = 8, "int"
        elif match := re.fullmatch(r"wint([248])", method.lower()):
            bits = int(match[1])
        elif method == "torchao":
            said = str(content.get("quant_type"))[:_LONGEST_TEXT]
            of_weights = re.search(r"'weight_dtype': {'_data': '(int|float)(\d)", said)
            if match := of_weights or re.search(r"'_type': '(Int|Float)(\d)", said):
                bits, kind = int(match[2]), "fp8" if match[1].lower() == "float" else "int"
        group = _first_int(inner, ("group_size", "q_group_size"))
        return cls(method, tool, bits, kind, group, where, content)

    def check_side_files(self, folder: pathlib.Path) -> None:
        """CheckpointError where a file beside config.json says something else than this."""
        for name in SIDE_FILES:
            path = folder / name
            if str(path) == self.where or not os.path.lexists(path):
                continue
            content = strict_json.read_object(path, max_bytes=MAX_CONFIG_BYTES)
            inner = content.get("quantization")
            other = inner if isinstance(inner, dict) else content
            for key, *synonyms in _SAID_TWICE:
                mine, theirs = (_said(one, (key, *synonyms)) for one in (self.content, other))
                if None not in (mine, theirs) and mine != theirs:
                    raise CheckpointError(
                        f"{path}: {key} is {theirs!r:.80}, but {self.where} says {mine!r:.80}. "
                        "Keep the file that the weights belong to."
                    )

    @property
    def scheme(self) -> str | None:
        """The scheme of fdq that stores weights most alike, if one does."""
        if self.kind in _SCHEMES:
            return _SCHEMES[self.kind]
        if self.bits not in _INTEGERS:
            return None
        if self.group in _GROUPS and self.bits != 8:
            return f"W{self.bits}A16-g{self.group}"
        return f"W{self.bits}A16"

    def __str__(self) -> str:
        """The tool and its bits: "GPTQ, 4 bits in groups of 128"."""
        kind = "" if self.kind == "int" or self.kind in self.tool.lower() else f" ({self.kind})"
        bits = "bits unknown" if self.bits is None else f"{self.bits} bits{kind}"
        return f"{self.tool}, {bits}" + (f" in groups of {self.group}" if self.group else "")

    def advice(self) -> str:
        """What fdq can do with such a checkpoint."""
        if self.method == "?" and self.tool == "HQQ":
            # What its own code saves.
            return (
                "config.json does not say that HQQ made the codes: add "
                '"quantization_config": {"quant_method": "hqq"} to it.'
            )
        like = f" fdq's --scheme {self.scheme} stores it alike." if self.scheme else ""
        return (
            f"Load or convert the float original that the codes of {self.tool} were made of.{like}"
        )

    def weights(self, info: TensorInfo) -> int | None:
        """How many weights a stored tensor has codes of: 0 for scales; None for plain floats."""
        name = info.name
        if name.endswith(_BESIDE) or ".quant_state." in name:
            return 0
        if name.endswith(_CODES) and (info.dtype.kind in "iu" or info.dtype.itemsize == 1):
            bits = self.bits if info.dtype.kind in "iu" and self.bits else 8
            return info.nbytes * 8 // bits
        return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what tools say of their codes."""
    mlx = () if _of_mlx(config.get(_MLX_KEY)) is None else (_MLX_KEY,)
    return {key: value for key, value in config.items() if key not in (*QUANTIZATION_KEYS, *mlx)}


def _of_mlx(content: Any) -> dict[str, Any] | None:
    """What MLX writes, which names no method; None if it is something else."""
    if not isinstance(content, dict) or not {"bits", "group_size"} <= content.keys():
        return None
    return {"quant_method": "mlx"} | content


def _of_hqq(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """HQQ's `quant_config.weight_quant_params`."""
    config = content.get("quant_config")
    weights = config.get("weight_quant_params") if isinstance(config, dict) else None
    return weights if isinstance(weights, dict) else None


def _weights_of_groups(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The weights' part of the first of compressed-tensors' `config_groups`."""
    groups = content.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and isinstance(group.get("weights"), dict):
            return group["weights"]
    return None


def _said(content: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of some keys that is not null."""
    return next((content[name] for name in names if content.get(name) is not None), None)


def _first_int(content: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of some keys that holds a whole number above zero."""
    for name in names:
        if type(value := content.get(name)) is int and value > 0:
            return value
    return None
