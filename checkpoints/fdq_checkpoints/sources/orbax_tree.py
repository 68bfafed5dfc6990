"""Orbax checkpoints of floats: trees of yours, and what `fdq.save` wrote of floats."""

import os
import pathlib
from typing import Any

import numpy as np

from fdq import models
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.sources.source import Source
from fdq_checkpoints.store import manifest, orbax_store
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.tree_paths import Path


class OrbaxTree(Source):
    """An Orbax tree, below a prefix, without nnx.State's `value` keys; with a config, a model's."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        subtree: str | None = None,
        config: models.DecoderConfig | None = None,
        dtype: Any = None,
        files: tuple[pathlib.Path, ...] = (),
    ):
        self.folder, self._subtree, self._files = folder, subtree, list(files)
        self._reader = orbax_store.TreeReader(folder)
        prefix = tuple(subtree.split(".")) if subtree else ()
        stored = {
            path[len(prefix) :]: path
            for path in self._reader.metadata
            if path[: len(prefix)] == prefix and len(path) > len(prefix)
        }
        if not stored:
            tops = sorted({path[0] for path in self._reader.metadata})
            raise CheckpointError(
                f"{folder}: nothing below {subtree!r}; the tree has {', '.join(tops)}."
            )
        if all(path[-1] == "value" and len(path) > 1 for path in stored):
            stored = {path[:-1]: full for path, full in stored.items()}
        self._stored = stored
        self.tree = tree_paths.nested(
            {path: self._reader.metadata[full] for path, full in stored.items()}
        )
        self._last: tuple[Path, np.ndarray] | None = None
        if config is not None:
            self._see_as_model(config, dtype)
        elif dtype is not None:
            raise CheckpointError(f"{folder}: dtype= is for models; a tree keeps its dtypes.")

    def _see_as_model(self, config: models.DecoderConfig, dtype: Any) -> None:
        model = models.abstract(config, dtype)
        found = {tensor.path: tensor.value.shape for tensor in tree_paths.flatten(self.tree)}
        expected = {tensor.path: tensor.value.shape for tensor in tree_paths.flatten(model)}
        tree_paths.check_same_paths(expected=expected, found=found, what=str(self.folder))
        for path, shape in expected.items():
            if found[path] != shape:
                raise CheckpointError(
                    f"{self.folder}: {tree_paths.dotted(path)} has shape {found[path]}, expected "
                    f"{shape} from the config."
                )
        self.tree, self.config = model, model.config

    def read(self, path: Path, index: int | None = None) -> np.ndarray:
        """The tensor at `path`, or `tensor[index]` (the tensor is kept for the next index)."""
        if self._last is None or self._last[0] != path:
            self._last = None
            full = self._stored[path]
            self._last = (path, self._reader.read([full])[full])
        return self._last[1] if index is None else self._last[1][index]

    def companions(self) -> list[pathlib.Path]:
        """The files of an fdq checkpoint."""
        return self._files

    @property
    def state(self) -> list[Any]:
        """The subtree as well."""
        return [self._subtree, *super().state]


class OrbaxTrees:
    """Directories that Orbax wrote, by either of its APIs."""

    name = "Orbax tree"
    takes_trees = True

    def claims(self, folder: pathlib.Path) -> bool:
        """An Orbax checkpoint, or a directory of the steps of a training run."""
        return orbax_store.is_orbax(folder) or bool(orbax_store.steps(folder))

    def open(self, folder: pathlib.Path, **options: Any) -> OrbaxTree:
        """Reads the metadata; options as of `OrbaxTree`."""
        if not orbax_store.is_orbax(folder):
            raise CheckpointError(
                f"{folder}: holds steps {', '.join(orbax_store.steps(folder)[-5:])}. Give the "
                "directory of one of them."
            )
        return OrbaxTree(folder, **options)


class StoredFloats:
    """What `fdq.save` wrote, where it is not quantized."""

    name = "fdq checkpoint"
    takes_trees = True

    def claims(self, folder: pathlib.Path) -> bool:
        """Has fdq.json."""
        return os.path.lexists(folder / manifest.FILE_NAME)

    def open(self, folder: pathlib.Path, **options: Any) -> OrbaxTree:
        """Reads the manifest; CheckpointError if anything is quantized."""
        stored = StoredTensors(folder)
        if any(entry.spec is not None for entry in stored.manifest.tensors):
            raise CheckpointError(
                f"{folder}: quantized already ({stored.manifest.scheme}). Convert the original."
            )
        if stored.manifest.config is not None:
            options["config"] = stored.config()
        files = tuple(folder / name for name in stored.manifest.files)
        return OrbaxTree(folder / manifest.WEIGHTS, files=files, **options)


ORBAX_TREES, STORED_FLOATS = OrbaxTrees(), StoredFloats()
