"""What is exported: a model in memory, an fdq checkpoint, or whatever else fdq reads."""

import abc
import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from fdq import models
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import CacheSpec
from fdq_checkpoints import saving, stream, tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.source_directory import MAX_CONFIG_BYTES
from fdq_checkpoints.sources import open_source
from fdq_checkpoints.sources.runs import checkpoint_directory
from fdq_checkpoints.store import adapters
from fdq_checkpoints.store import manifest as manifests
from fdq_checkpoints.store.commit import file_digest
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.tree_paths import Path, Tensor, dotted

_CONFIG = "config.json"


class Origin(abc.ABC):
    """A model, tensor by tensor.

    Attributes:
      where: what to call it in messages.
      config: of the model.
      tensors: by path in fdq's tree and in its order; their values may be abstract.
      recipe: what it was quantized by, as `Recipe.to_json` gives it.
    """

    where: str
    config: models.DecoderConfig
    tensors: dict[Path, Tensor]
    recipe: Any = None

    @property
    def cache(self) -> CacheSpec | None:
        """The format of the cache that the model was quantized for."""
        try:
            return Recipe.from_json(self.recipe).cache if self.recipe else None
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.where}: recipe: {error}") from error

    @abc.abstractmethod
    def read(self, path: Path) -> Any:
        """A tensor on the host: a NumPy array, or a canonical QTensor of such."""

    @abc.abstractmethod
    def files(self) -> list[pathlib.Path]:
        """Those beside the weights that are there: of the tokenizer, config.json and such."""

    @functools.cached_property
    def published_config(self) -> dict[str, Any] | None:
        """The config.json that the model came with, if it is there."""
        path = next((file for file in self.files() if file.name == _CONFIG), None)
        if path is None:
            return None
        return strict_json.read_object(path, max_bytes=MAX_CONFIG_BYTES)

    def companions(self) -> list[pathlib.Path]:
        """The files that are copied as they are."""
        return [file for file in self.files() if file.name != _CONFIG]

    @property
    def has_codes(self) -> bool:
        """Whether any of the tensors is quantized."""
        return any(isinstance(t.value, tree_paths.QUANTIZED) for t in self.tensors.values())


class _InMemory(Origin):
    """A model of arrays."""

    where = "the model"

    def __init__(self, model: models.Decoder):
        parts = adapters.Parts.of(model)
        if parts.adapters:
            _refuse_adapters(f"the model's {dotted(parts.adapters[0].path)}")
        self.config, self.recipe = model.config, getattr(model, "recipe_record", None)
        self.tensors = dict(parts.base)
        self._files = saving.attached_files(model)
        for path, tensor in self.tensors.items():
            if any(
                not hasattr(a, "__array__") for a in tree_paths.arrays_of(tensor.value).values()
            ):
                raise CheckpointError(f"{dotted(path)}: abstract, it has no values to export.")

    def read(self, path: Path) -> Any:
        return tree_paths.map_arrays(lambda _, array: np.asarray(array), self.tensors[path])

    def files(self) -> list[pathlib.Path]:
        return self._files


class _Stored(Origin):
    """An fdq checkpoint."""

    def __init__(self, folder: pathlib.Path):
        self._stored = StoredTensors(folder)
        manifest = self._stored.manifest
        if manifest.kind != "model":
            raise CheckpointError(
                f"{folder}: a tree of arrays, not a model. Make a model of it first: fdq convert "
                "SRC DST --config config.json."
            )
        if (beside := adapters.of_checkpoint(folder)) is not None:
            _refuse_adapters(beside)
        self.where, self.config = str(folder), self._stored.config()
        self.recipe = manifest.provenance.get("recipe")
        self._entries = {entry.path: entry for entry in manifest.tensors}
        self.tensors = {
            path: Tensor(path, entry.abstract(), entry.activation)
            for path, entry in self._entries.items()
        }

    def read(self, path: Path) -> Any:
        entry = self._entries[path]
        return tree_paths.with_arrays(entry.abstract(), self._stored.read_one(entry))

    def files(self) -> list[pathlib.Path]:
        found = []
        for name, said in self._stored.manifest.files.items():
            path = self._stored.folder / name
            if not path.is_file() or file_digest(path) != said["sha256"]:
                raise CheckpointError(f"{path}: missing, or changed since the checkpoint was made.")
            found.append(path)
        return found


class _Opened(Origin):
    """A checkpoint of another kind."""

    def __init__(self, source: Any):
        self.where = str(source.folder)
        if source.config is None:
            raise CheckpointError(f"{source.folder}: a tree of arrays, not a model.")
        self.config, self._source = source.config, source
        self._job = stream.Job.of(source, None)
        self.tensors = {tensor.path: tensor for tensor in tree_paths.flatten(source.tree)}

    def read(self, path: Path) -> Any:
        return self._job.value(self.tensors[path])

    def files(self) -> list[pathlib.Path]:
        return self._source.companions()


@contextlib.contextmanager
def opened(model: Any) -> Iterator[Origin]:
    """A model, or the path of a checkpoint of one; FileNotFoundError, CheckpointError as `load`."""
    if isinstance(model, models.Decoder):
        yield _InMemory(model)
        return
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"export: expected the path of a checkpoint or an fdq model, found {type(model)!r}."
        )
    folder = checkpoint_directory(model)
    if os.path.lexists(folder / manifests.FILE_NAME):
        yield _Stored(folder)
        return
    with open_source(folder) as source:
        yield _Opened(source)


def _refuse_adapters(what: Any) -> None:
    raise CheckpointError(
        f"{what}: adapters, which no export has a place for. Merge them into the weights first "
        "(fdq.merge_lora), or save them alone (fdq.save_lora)."
    )
