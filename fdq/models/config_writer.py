"""Writes a Hugging Face config.json: what `fdq.models.config_reader` reads, the other way round.

In the older spelling (`rope_theta`, `rope_scaling`, `torch_dtype`), which transformers 5 reads too.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from fdq.models.config import DecoderConfig
from fdq.models.family import FAMILIES, from_huggingface
from fdq.models.parts import GeGLU, Part
from fdq.nn.rotary import RotaryConfig

# By rope_type, the fields of a RotaryConfig that it reads, and their keys.
_STRETCH = {"factor": "factor", "original_max_position": "original_max_position_embeddings"}
_YARN = {name: name for name in ("attention_factor", "beta_fast", "beta_slow", "truncate")}
_PARAMETERS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": _STRETCH | _YARN,
    "longrope": _STRETCH
    | {name: name for name in ("attention_factor", "short_factor", "long_factor")},
    "llama3": _STRETCH
    | {name: name for name in ("low_freq_factor", "high_freq_factor")},
}  # fmt: skip


def to_huggingface(config: DecoderConfig) -> dict[str, Any]:
    """The content of a config.json that `from_huggingface` reads as this config.

    Of a family that is `written_as` another it is read as that.

    Raises:
      ValueError: an unknown family, or a config that its config.json cannot say; names the field.
    """
    config = as_written(config)
    family = FAMILIES[config.model_type]
    more = family.write(config) if family.write is not None else {}
    named = {} if family.architecture is None else {"architectures": [family.architecture]}
    written = named | base(config) | dict(more)
    try:
        read = from_huggingface(written)
    except ValueError as error:
        raise ValueError(f"no config.json of {config.model_type} says this: {error}") from error
    for field in dataclasses.fields(config):
        found, meant = getattr(read, field.name), getattr(config, field.name)
        if _plain(found) != _plain(meant):
            raise ValueError(
                f"no config.json of {config.model_type} says {field.name}={meant!r:.120}; read "
                f"back it is {found!r:.120}"
            )
    return written


def as_written(config: DecoderConfig) -> DecoderConfig:
    """The config of what is written of a model: of a multimodal one that of its text."""
    name = FAMILIES[config.model_type].written_as
    return config if name is None else config.replace(model_type=name)


def base(config: DecoderConfig) -> dict[str, Any]:
    """What most families spell alike; keys that mean nothing are left out."""
    gelu = isinstance(config.mlp, GeGLU)
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        **({"hidden_activation": "gelu_pytorch_tanh"} if gelu else {"hidden_act": "silu"}),
        "rms_norm_eps": config.rms_norm_epsilon,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_word_embeddings,
        **rotary(config.rotary),
        **{key: found for key, found in tokens(config).items() if found is not None},
        "torch_dtype": config.dtype,
    }


def tokens(config: DecoderConfig) -> dict[str, Any]:
    """Special tokens; null where there is none."""
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }


def rotary(config: RotaryConfig) -> dict[str, Any]:
    """`rope_theta`, and `rope_scaling` where a context is stretched."""
    said: dict[str, Any] = {"rope_theta": config.theta}
    if config.partial_factor != 1:
        said["partial_rotary_factor"] = config.partial_factor
    if config.rope_type != "default":
        scaling: dict[str, Any] = {"rope_type": config.rope_type}
        for field, key in _PARAMETERS[config.rope_type].items():
            found = getattr(config, field)
            if found is not None:
                scaling[key] = list(found) if isinstance(found, tuple) else found
        said["rope_scaling"] = scaling
    return said


def windows(config: DecoderConfig, *, by_layer: bool = True) -> dict[str, Any]:
    """`sliding_window`, and `layer_types` where layers differ (`by_layer`: the family reads them).

    Null where there is none: some families mean a window where nothing is said.
    """
    kinds = [config.sliding_window(layer) for layer in range(config.num_layers)]
    sizes = {kind for kind in kinds if kind is not None}
    said: dict[str, Any] = {"sliding_window": max(sizes) if sizes else None}
    if sizes and by_layer:
        names = ("full_attention", "sliding_attention")
        said["layer_types"] = [names[kind is not None] for kind in kinds]
    return said


def window_by_layer(config: DecoderConfig) -> dict[str, Any]:
    """`layer_types` also of a model without windows, whose family means some where it is silent."""
    said = windows(config)
    if said["sliding_window"] is None:
        return {"layer_types": ["full_attention"] * config.num_layers}
    return said


def part[P: Part](config: DecoderConfig, field: str, kind: type[P]) -> P:
    """The part in a field of a config (`moe.router`), if it is of the kind that a family has.

    Raises:
      ValueError: it is of another kind, or none.
    """
    found = operator.attrgetter(field)(config)
    if not isinstance(found, kind):
        raise ValueError(
            f"no config.json of {config.model_type} says {field}={found!r:.120}: expected a part "
            f"of kind {kind.name!r}"
        )
    return found


def _plain(value: Any) -> Any:
    """A field such that equal meanings are equal: no windows, in every layer."""
    if isinstance(value, tuple) and all(one is None for one in value):
        return ()
    return value


def same_model(one: Mapping[str, Any], config: DecoderConfig) -> bool:
    """Whether a config.json describes this model: all but the dtype and special tokens."""
    try:
        read = from_huggingface(one)
    except ValueError:
        return False
    free = {"dtype", "bos_token_id", "eos_token_ids", "pad_token_id"}
    return all(
        _plain(getattr(read, field.name)) == _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in free
    )
