"""`load_lora`: adapters that PEFT or fdq wrote, beside the layers of a model."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import models, nn
from fdq.adapters.low_rank import plain_layers_of, with_adapters
from fdq.formats.qtensor import QuantizedWeight
from fdq.nn.parameters import value
from fdq_checkpoints.errors import CheckpointError, nearest, shown
from fdq_checkpoints.peft.adapter_config import Settings
from fdq_checkpoints.peft.names import (
    CONFIG,
    LORA_A,
    LORA_B,
    PREFIX,
    WEIGHTS,
    Place,
    known_places,
)
from fdq_checkpoints.readers.safetensors_reader import SafetensorsFile


def load_lora(model: Any, path: str | os.PathLike[str]) -> Any:
    """What `fdq.load_lora` does and says."""
    folder = _directory(path)
    settings = Settings.read(folder / CONFIG)
    if not isinstance(model, nnx.Module):
        raise TypeError(f"load_lora: expected a model, found a {type(model).__name__}.")
    layers = plain_layers_of(model)
    with SafetensorsFile(folder / WEIGHTS) as file:
        places = known_places(model, file.tensors)
        pairs: dict[str, list[tuple[str, Place]]] = {}
        for name in _pairs(file, places, model):
            pairs.setdefault(places[name].part, []).append((name, places[name]))
        adapters = {part: _read(file, part, own, settings) for part, own in pairs.items()}
    starts = {part.path: part.start for layer in layers for part in layer.parts}
    return with_adapters(
        model,
        {
            part: nn.LowRank(a, b, alpha=alpha, start=starts[part])
            for part, (a, b, alpha) in adapters.items()
        },
    )


def _directory(path: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such directory. Expected one with {CONFIG} and {WEIGHTS}, as "
            "fdq.save_lora and PEFT write them."
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            hint = (
                " adapter_model.bin is a pickle, which can run code when loaded: save the adapters "
                "with safe_serialization=True."
            )
            raise CheckpointError(f"{folder}: no {name}.{hint if pickled else ''}")
    return folder


def _pairs(file: SafetensorsFile, places: Mapping[str, Place], model: Any) -> list[str]:
    """Layers that the file has adapters of; CheckpointError for anything else in it."""
    found: dict[str, set[str]] = {}
    for name in file.tensors:
        layer = name.removeprefix(PREFIX)
        suffix = next((one for one in (LORA_A, LORA_B) if layer.endswith(one)), None)
        if name.startswith(PREFIX) and suffix is None and _is_copy_of_base(file, name, model):
            continue
        if suffix is None or not name.startswith(PREFIX):
            raise CheckpointError(
                f"{file.path}: tensor {shown(name)}: expected {PREFIX}<layer>{LORA_A} and "
                f"{LORA_B}, the adapters of linear layers. Merge these with PEFT "
                "(merge_and_unload), and load the result."
            )
        layer = layer.removesuffix(suffix)
        if layer not in places:
            raise CheckpointError(
                f"{file.path}: tensor {shown(name)}: the {type(model).__name__} has no linear "
                f"layer {shown(layer)}.{nearest(layer, places)}"
            )
        found.setdefault(layer, set()).add(suffix)
    for layer, suffixes in found.items():
        if len(suffixes) < 2:
            raise CheckpointError(
                f"{file.path}: layer {shown(layer)} has {min(suffixes)[1:]} alone, expected both."
            )
    if not found:
        raise CheckpointError(f"{file.path}: no adapters.")
    return list(found)


def _is_copy_of_base(file: SafetensorsFile, name: str, model: Any) -> bool:
    """Whether a tensor is the model's embedding or head, which PEFT saves beside their adapters.

    CheckpointError where it is another one: of a vocabulary that has grown, say.
    """
    layer = name.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    if not isinstance(model, models.Decoder) or not name.endswith(".weight"):
        return False
    head = layer.rpartition(".")[2] == "lm_head"
    if not head and layer.rpartition(".")[2] != "embed_tokens":
        return False
    tied = model.embed_tokens.embedding
    held = value(tied if not head or model.lm_head is None else model.lm_head.kernel)
    transposed = head and model.lm_head is not None
    shape = tuple(held.shape[::-1] if transposed else held.shape)
    same = file.tensors[name].shape == shape
    if same and not isinstance(held, QuantizedWeight):
        theirs = file.read(name).T if transposed else file.read(name)
        same = np.array_equal(np.asarray(jnp.asarray(theirs).astype(held.dtype)), np.asarray(held))
    if not same:
        raise CheckpointError(
            f"{file.path}: tensor {shown(name)} {file.tensors[name].shape} is not the model's "
            f"{shape}: it was trained or resized. Merge the adapters with PEFT (merge_and_unload)."
        )
    return True


def _read(
    file: SafetensorsFile, part: str, own: list[tuple[str, Place]], settings: Settings
) -> tuple[Any, Any, float]:
    """`lora_a`, `lora_b` and alpha of one part, of all its experts."""
    first = own[0][1]
    if first.expert is not None and len(own) < first.count:
        raise CheckpointError(
            f"{file.path}: {part}: {len(own)} of {first.count} experts have adapters, expected all."
        )
    pairs, factors = [], set()
    for name, place in sorted(own, key=lambda item: item[1].expert or 0):
        rank, alpha = settings.of(name)
        factors.add((rank, alpha))
        k, n = place.shape[-2:]
        pair = []
        for suffix, shape in ((LORA_A, (rank, k)), (LORA_B, (n, rank))):
            key = f"{PREFIX}{name}{suffix}"
            info = file.tensors[key]
            if info.shape != (*place.shape[:-2], *shape):
                raise CheckpointError(
                    f"{file.path}: tensor {shown(key)} has shape {info.shape}, expected "
                    f"{(*place.shape[:-2], *shape)} of a layer [{k}, {n}] and the rank of "
                    f"{settings.path.name}."
                )
            if not jnp.issubdtype(info.dtype, jnp.floating) or info.dtype.itemsize not in (2, 4):
                raise CheckpointError(
                    f"{file.path}: tensor {shown(key)} is {info.dtype}, expected floats of 16 or "
                    "32 bits."
                )
            array = file.read(key).swapaxes(-1, -2)
            if not np.isfinite(array).all():
                raise CheckpointError(f"{file.path}: tensor {shown(key)} has NaN or infinity.")
            pair.append(array)
        pairs.append(pair)
    if len(factors) > 1:
        raise CheckpointError(
            f"{settings.path}: experts of {part} have several ranks or factors, expected one."
        )
    a, b = (
        np.stack(one) if first.expert is not None else one[0] for one in zip(*pairs, strict=True)
    )
    return jnp.asarray(a), jnp.asarray(b), factors.pop()[1]
