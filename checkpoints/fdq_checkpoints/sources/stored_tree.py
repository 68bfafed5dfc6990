"""What `fdq.save` and `fdq.convert` wrote of floats, to be quantized."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.sources import tree_view
from fdq_checkpoints.sources.source import TreeSource
from fdq_checkpoints.store import adapters, manifest
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.store.stored_model import abstract_model
from fdq_checkpoints.tree_paths import Path


class StoredTree(TreeSource):
    """An fdq checkpoint without anything quantized, as a model or nested dicts."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        dtype: Any = None,
        verify: bool = True,
        subtree: str | None = None,
        config: Any = None,
    ):
        self.folder, self.verify, self._subtree = folder, verify, subtree
        self.tensors = stored = StoredTensors(folder)
        entries = {entry.path: entry for entry in stored.manifest.tensors}
        paths = tree_view.below(entries, subtree, folder)
        self._entries = {path: entries[full] for path, full in paths.items()}
        if any(entry.spec is not None for entry in self._entries.values()):
            raise CheckpointError(
                f"{folder}: quantized already ({stored.manifest.scheme}). Load it without a "
                "scheme, or convert the original again."
            )
        self._files = [folder / name for name in stored.manifest.files]
        found = {path: _abstract(entry) for path, entry in self._entries.items()}
        if config is not None:
            known, files = tree_view.read_config(config)
            self._files = files or self._files
            self.tree = tree_view.as_model(found, known, dtype, folder)
            self.config = self.tree.config
        elif stored.manifest.kind == "model" and subtree is None:
            self.tree = self._own_model(found, dtype)
            self.config, self.adapters = self.tree.config, adapters.of_checkpoint(folder)
        elif dtype is not None:
            raise CheckpointError(f"{folder}: dtype= is for models, this is a pytree.")
        else:
            self.tree = tree_paths.nested(found)

    def _own_model(self, found: dict[Path, jax.ShapeDtypeStruct], dtype: Any) -> Any:
        model = abstract_model(self.tensors, dtype)
        paths = [tensor.path for tensor in tree_paths.flatten(model)]
        tree_paths.check_same_paths(expected=paths, found=found, what=str(self.folder))
        if dtype is not None:
            return model
        return tree_paths.fill(model, found)  # in the stored dtypes, whatever the config says

    def _read(self, path: Path) -> Any:
        entry = self._entries[path]
        array = self.tensors.read_one(entry, verify=self.verify)["value"]
        if entry.prng is None:
            return array
        return jax.random.wrap_key_data(jnp.asarray(array), impl=entry.prng)

    def companions(self) -> list[pathlib.Path]:
        """The files beside the weights, or those beside the config that was given as a file."""
        return self._files


def _abstract(entry: manifest.TensorEntry) -> jax.ShapeDtypeStruct:
    array = entry.abstract()
    if entry.prng is None:
        return array
    return jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=entry.prng), array)


class StoredTrees:
    """Directories with fdq.json."""

    name = "fdq checkpoint"
    takes_trees = True

    def claims(self, folder: pathlib.Path) -> bool:
        """Has fdq.json."""
        return os.path.lexists(folder / manifest.FILE_NAME)

    def open(self, folder: pathlib.Path, **options: Any) -> StoredTree:
        """Reads the manifest; options as of `StoredTree`."""
        return StoredTree(folder, **options)


STORED_TREES = StoredTrees()
