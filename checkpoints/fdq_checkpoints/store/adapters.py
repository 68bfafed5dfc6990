"""What a model holds besides the tensors of its config: adapters (LoRA), heads of its user's.

A model is stored as its config says, so that it loads without anything else. Modules wrapped around
its layers lengthen their paths (`o_proj.base_module.kernel`), which are shortened again; what the
config does not know is a checkpoint of its own in the folder `adapters`, under the paths of the
model. A template with the same modules brings both together.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable

from fdq import models
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError, nearest
from fdq_checkpoints.store import manifest
from fdq_checkpoints.tree_paths import Path, Tensor, dotted

FOLDER = "adapters"
_LOGGER = logging.getLogger("fdq")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of a model: by its path in the plain model each of the `base`, and the others."""

    base: dict[Path, Tensor]
    adapters: list[Tensor]

    @classmethod
    def of(cls, model: models.Decoder) -> "Parts":
        """CheckpointError where the base is not whole, or a tensor of it there twice."""
        plain = tree_paths.flatten(models.abstract(model.config))
        shapes = {tensor.path: tuple(tensor.value.shape) for tensor in plain}
        tensors = tree_paths.flatten(model)
        base = {t.path: t for t in tensors if _belongs(t.path, t, shapes)}
        wrapped: dict[Path, Tensor] = {}
        adapters = []
        for tensor in tensors:
            if tensor.path in base:
                continue
            place = _unwrapped(tensor, shapes, base)
            if place is None:
                adapters.append(tensor)
            elif place in wrapped:
                raise CheckpointError(
                    f"{dotted(tensor.path)} and {dotted(wrapped[place].path)}: both could be the "
                    f"model's {dotted(place)}, so the model would not load again. Save "
                    "nnx.state(model) instead, and load it into a template."
                )
            else:
                wrapped[place] = tensor
        base |= wrapped
        if missing := [path for path in shapes if path not in base]:
            found = [dotted(tensor.path) for tensor in tensors]
            raise CheckpointError(
                f"the model has no {dotted(missing[0])}, which its config asks for, so it would "
                f"not load again.{nearest(dotted(missing[0]), found)} Save nnx.state(model) "
                "instead, and load it into a template."
            )
        order = {path: index for index, path in enumerate(shapes)}
        ordered = sorted(base, key=lambda path: order.get(path, len(order)))
        return cls({path: base[path] for path in ordered}, adapters)


def _belongs(place: Path, tensor: Tensor, shapes: dict[Path, tuple[int, ...]]) -> bool:
    """Whether the plain model has such a tensor there, once quantized and calibrated."""
    if place in shapes:
        return tuple(tensor.value.shape) == shapes[place]
    room, name = place[:-1], place[-1]
    if name == "activation_scale":
        return (*room, "kernel") in shapes
    is_scale = name[1:] in ("_cache_scale", "_cache_zero", "_cache_mean")
    return is_scale and any(path[: len(room)] == room for path in shapes)


def _unwrapped(
    tensor: Tensor, shapes: dict[Path, tuple[int, ...]], taken: Iterable[Path]
) -> Path | None:
    """Where the tensor would be without the modules around its layer; None for no such place."""
    paths = [tensor.path]
    while paths and len(paths[0]) > 2:
        # The last key names the tensor; those around it may be a wrapper's.
        paths = [path[:i] + path[i + 1 :] for path in paths for i in range(1, len(path) - 1)]
        for path in paths:
            if path not in taken and _belongs(path, tensor, shapes):
                return path
    return None


def of_checkpoint(folder: pathlib.Path) -> pathlib.Path | None:
    """Where the adapters beside a stored model are, if there are some."""
    path = folder / FOLDER
    return path if (path / manifest.FILE_NAME).is_file() else None


def tell(folder: pathlib.Path) -> None:
    """Say once that a model is loaded without the adapters beside it."""
    if (path := of_checkpoint(folder)) is not None:
        _LOGGER.warning(
            "%s: the base is loaded. %s has its adapters; template=, a model with such adapters, "
            "loads both.",
            folder,
            path,
        )
