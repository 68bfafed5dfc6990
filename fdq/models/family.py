"""A model family: how its config.json is read, its published models, its tensors' names."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from fdq.models.config import DecoderConfig
from fdq.models.config_reader import ConfigReader
from fdq.registry import Registry

# As stored; a matrix stored [out, in]; a vector stored with a leading axis of one; two parts whose
# columns are stored in turns; float32 numbers that are stored less 1.
Layout = Literal["same", "transposed", "row", "interleaved", "plus_one"]
Widths = Literal["qkv", "equal"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where a kind of tensor, by its path in fdq's tree, is in somebody else's checkpoint, as data.

    The source `names` are joined along the target's last axis, with shares by `widths`: `qkv` by
    the model's heads, or `equal` parts. `{i}` is the layer, and `{e}` an expert, over which the
    target's first axis goes.
    """

    target: str
    names: tuple[str, ...]
    layout: Layout = "same"
    widths: Widths = "equal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share a `model_type`.

    Attributes:
      name: the `model_type` of a Hugging Face config.json.
      read: makes the config out of what it reads key by key; a key that it does not read is
        refused, unless it is known to be neutral, null or false.
      configs: its published models by name, beside those of `published.json`.
      tensor_names: where its tensors are in Hugging Face checkpoints, where that is not what most
        families call them; these rules are asked first.
      roots: beginnings that names may have in place of `model.`, each with that of the head in
        place of `lm_head.`.
      left_out: patterns of tensors that are no part of the decoder, such as a vision tower.
      architecture: the class of transformers that its config.json names; None where transformers
        has none.
      write: the inverse of `read`: what config.json says beside what all families say alike
        (`fdq.models.config_writer.base`), or in its place.
      written_as: the family whose config.json and names are written, where it is another: that of
        a multimodal model's text.
    """

    name: str
    read: Callable[[ConfigReader], DecoderConfig]
    configs: Mapping[str, DecoderConfig] = dataclasses.field(default_factory=dict)
    tensor_names: tuple[Rule, ...] = ()
    roots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    architecture: str | None = None
    write: Callable[[DecoderConfig], Mapping[str, Any]] | None = None
    written_as: str | None = None

    def from_huggingface(self, config: Mapping[str, Any]) -> DecoderConfig:
        """The DecoderConfig of a config.json of this family; raises as `from_huggingface` does."""
        reader = ConfigReader(config)
        result = self.read(reader)
        reader.finish()
        return result


FAMILIES: Registry[Family] = Registry("model family")
"""The families by `model_type`; `FAMILIES.register(Family(...))` adds one."""


@functools.cache
def _published() -> dict[str, DecoderConfig]:
    """`published.json`: of each model's config.json what its family does not take for granted."""
    text = pathlib.Path(__file__).with_name("published.json").read_text("utf-8")
    return {name: from_huggingface(config) for name, config in json.loads(text).items()}


class _Configs(Mapping[str, DecoderConfig]):
    """The published models of all families, those included that were registered later."""

    def _all(self) -> dict[str, DecoderConfig]:
        configs = dict(_published())
        for family in FAMILIES.values():
            configs |= family.configs
        return configs

    def __getitem__(self, name: str) -> DecoderConfig:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


# Families that others ask for, and what of them has no part here.
_WITHOUT_PARTS = {
    "gated delta nets (linear attention)": (
        "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "kimi_linear",
    ),
    "state spaces (Mamba)": (
        "mamba", "mamba2", "jamba", "bamba", "zamba2", "falcon_h1", "falcon_mamba", "nemotron_h",
        "granitemoehybrid",
    ),
    "lightning attention": ("minimax",),
    "short convolutions": ("lfm2", "lfm2_moe"),
    "an indexer that picks the tokens to attend to": ("deepseek_v32", "glm_moe_dsa"),
    "norms of all heads together": ("olmo2", "olmo3", "olmoe", "minimax_m2"),
    "a half that is attention and MLP side by side": ("cohere", "cohere2", "phi", "gpt_neox"),
}  # fmt: skip


CONFIGS: Mapping[str, DecoderConfig] = _Configs()
"""Published models by name, for planning and abstract quantization without a checkpoint."""


def from_huggingface(config: Mapping[str, Any]) -> DecoderConfig:
    """The DecoderConfig of a Hugging Face config.json, read by `json.load`.

    Reads the spelling of transformers 5 (`rope_parameters`) and the older one (`rope_theta`,
    `rope_scaling`). A key that says nothing about the mathematics is ignored; one that is not
    known is an error unless it is null or false. `quantization_config` is not read here.

    Raises:
      ValueError: a model type that is not supported (the message lists the supported ones), a
        missing or unknown key, or a value that asks for something else than what is implemented.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        for reason, families in _WITHOUT_PARTS.items():
            if model_type in families:
                raise ValueError(
                    f"model_type {model_type!r} is not supported: its layers have {reason}, which "
                    "fdq has no part for"
                )
        raise ValueError(
            f"model_type {model_type!r:.200} is not supported{_of_several(config)}; supported are "
            + ", ".join(FAMILIES)
        )
    return FAMILIES[model_type].from_huggingface(config)


def _of_several(config: Mapping[str, Any]) -> str:
    """What a config of another family is of, where it is of more than text."""
    kinds = {
        key: inner.get("model_type")
        for key, inner in config.items()
        if isinstance(key, str) and key.endswith("_config") and isinstance(inner, Mapping)
    }
    of_text = kinds.get("text_config", kinds.get("llm_config"))
    if "text_config" not in kinds and "llm_config" not in kinds:
        return ""
    others = sorted(kinds.keys() - {"text_config", "llm_config", "quantization_config"})
    beside = f" beside {', '.join(others)}" if others else ""
    return f": it is a multimodal model, of text {of_text!r}{beside}, and fdq has no part of it"
