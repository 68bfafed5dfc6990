"""`save_lora`: adapters of a model, as PEFT writes them."""

import json
import os
from typing import Any

import jax
import numpy as np

from fdq import models
from fdq.adapters.layers import layers_of
from fdq.adapters.low_rank import adapters_of
from fdq.nn.parameters import value
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.export.safetensors_writer import WHOLE, Planned, SafetensorsWriter
from fdq_checkpoints.peft.adapter_config import config_of
from fdq_checkpoints.peft.names import CONFIG, LORA_A, LORA_B, PREFIX, WEIGHTS, places_of
from fdq_checkpoints.store import commit


def save_lora(
    model: Any,
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """What `fdq.save_lora` does and says."""
    adapters_of(model)
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, float] = {}
    layers = layers_of(model)
    places = {name: place for layer in layers for name, place in places_of(model, layer).items()}
    adapters = {
        part.path: layer.adapters[part.name]
        for layer in layers
        for part in layer.parts
        if part.name in layer.adapters
    }
    if lost := sorted(adapters.keys() - {place.part for place in places.values()}):
        raise CheckpointError(
            f"{lost[0]}: PEFT has no adapters of layers that its family stores so. Save the whole "
            "model instead (fdq.save), which keeps adapters beside it."
        )
    for name, place in places.items():
        one = adapters.get(place.part)
        if one is None:
            continue
        for suffix, held in ((LORA_A, one.lora_a), (LORA_B, one.lora_b)):
            array = value(held)
            if isinstance(array, jax.ShapeDtypeStruct):
                raise CheckpointError(f"{place.part}: abstract, it has no values to save.")
            array = np.asarray(array if place.expert is None else array[place.expert])
            tensors[f"{PREFIX}{name}{suffix}"] = np.ascontiguousarray(array.swapaxes(-1, -2))
        alphas[name] = one.alpha
    ranks = {name: tensors[f"{PREFIX}{name}{LORA_A}"].shape[-2] for name in alphas}
    content = config_of(isinstance(model, models.Decoder), base, ranks, alphas, places)
    needed = sum(array.nbytes for array in tensors.values())
    planned = [Planned(name, array.dtype, array.shape) for name, array in tensors.items()]
    replaces = commit.Replaceable("adapters", lambda folder: (folder / CONFIG).is_file())
    with commit.pending_directory(
        path, overwrite=overwrite, needed_bytes=needed, replaces=replaces
    ) as folder:
        with SafetensorsWriter(folder, planned, shard_bytes=needed + 1) as writer:
            for name, array in tensors.items():
                writer.write(name, array)
        (folder / WHOLE).rename(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
