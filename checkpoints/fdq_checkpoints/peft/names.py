"""What layers are called in the files of adapters.

A tensor `base_model.model.<layer>.lora_A.weight` is `[rank, K]`, its `lora_B` `[N, rank]`. Layers
of an fdq model have the names of published checkpoints, so the columns of fused layers are adapters
of their own (`q_proj`), and every expert has one; those of other modules have their own paths.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from fdq import models
from fdq.adapters.layers import Layer, layers_of
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.sources import published_names, tensor_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a pair of tensors belongs: a part of a layer, and of experts one of them."""

    part: str
    shape: tuple[int, ...]  # of the kernel's part, [..., K, N]
    expert: int | None = None
    count: int = 1  # of experts


def known_places(model: Any, tensors: Collection[str]) -> dict[str, Place]:
    """Where the names of a file belong, whichever beginning its family gives them."""
    layers = layers_of(model)
    plain = {name: place for layer in layers for name, place in places_of(model, layer).items()}
    family = _family(model)
    for root, head in family.roots.items() if family is not None else ():
        if any(name.startswith(f"{PREFIX}{root}") for name in tensors):
            beginnings = {"model.": root, "lm_head.": head}
            return {published_names.renamed(name, beginnings): at for name, at in plain.items()}
    return plain


def _family(model: Any) -> models.Family | None:
    known = isinstance(model, models.Decoder) and model.config.model_type in models.FAMILIES
    return models.FAMILIES[model.config.model_type] if known else None


def places_of(model: Any, layer: Layer) -> dict[str, Place]:
    """What PEFT calls the parts of a layer; nothing for those that it has no adapters of."""
    family, path = _family(model), layer.paths[0]
    parts = {(part.start, part.stop): part.path for part in layer.parts}
    *lead, k, _ = layer.shape
    own = {part.path: Place(part.path, (*lead, k, part.stop - part.start)) for part in layer.parts}
    if family is None:
        return own
    config = model.config
    rules = (*family.tensor_names, *published_names.HUGGING_FACE.rules)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    try:
        pieces = tensor_names.pieces(
            (*path.split("."), "kernel"), layer.shape, rules, qkv_widths=(q, kv, kv)
        )
    except CheckpointError:  # a layer of its user's
        return own
    return {
        piece.name.removesuffix(".weight"): Place(
            parts[piece.start, piece.stop],
            (k, piece.stop - piece.start),
            piece.expert,
            lead[0] if piece.expert is not None else 1,
        )
        for piece in pieces
        if piece.layout == "transposed" and (piece.start, piece.stop) in parts
    }
