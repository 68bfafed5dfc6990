"""Orbax checkpoints of floats: trees of yours, written by either of its APIs."""

import pathlib
from typing import Any

import numpy as np

from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.sources import tree_view
from fdq_checkpoints.sources.source import TreeSource
from fdq_checkpoints.store import commit, manifest, orbax_store
from fdq_checkpoints.tree_paths import Path, dotted


class OrbaxTree(TreeSource):
    """An Orbax tree, below a prefix, without nnx.State's `value` keys; with a config, a model's."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        subtree: str | None = None,
        config: Any = None,
        dtype: Any = None,
        name: str | None = None,
    ):
        self.folder, self._subtree, self._name = folder, subtree, name
        self._files: list[pathlib.Path] = []
        self._reader = orbax_store.TreeReader(folder)
        self._stored = self._arrays_below(subtree)
        found = {path: self._reader.metadata[full] for path, full in self._stored.items()}
        if config is not None:
            known, self._files = tree_view.read_config(config)
            self.tree = tree_view.as_model(found, known, dtype, folder)
            self.config = self.tree.config
            return
        if dtype is not None:
            raise CheckpointError(
                f"{folder}: dtype= is for models, and a tree keeps its dtypes. Give the model's "
                "config, or leave dtype out."
            )
        self.tree = tree_paths.nested(found)

    def _arrays_below(self, subtree: str | None) -> dict[Path, Path]:
        metadata, others = self._reader.metadata, self._reader.others
        found = tree_view.below([*metadata, *others], subtree, self.folder)
        tree_paths.check_distinct(found.values(), f"{self.folder}: ")
        if strange := [path for path in found.values() if path in others]:
            tops = ", ".join(sorted({path[0] for path in metadata}))
            raise CheckpointError(
                f"{self.folder}: {dotted(strange[0])} is a {others[strange[0]]}, no array. Choose "
                f"a part of the tree with subtree= (--subtree): {tops}."
            )
        if all(path[-1] == "value" and len(path) > 1 for path in found):
            return {path[:-1]: full for path, full in found.items()}
        return found

    def _read(self, path: Path) -> np.ndarray:
        full = self._stored[path]
        return self._reader.read([full])[full]

    def companions(self) -> list[pathlib.Path]:
        """What is beside the config that was given as a file."""
        return self._files

    @property
    def name(self) -> str:
        """With its run, where it is a step of one."""
        return self._name or super().name


class OrbaxTrees:
    """Directories that Orbax wrote, by either of its APIs."""

    name = "Orbax tree"
    takes_trees = True

    def claims(self, folder: pathlib.Path) -> bool:
        """An Orbax checkpoint, or a directory of the steps of a training run."""
        return orbax_store.is_orbax(folder) or bool(orbax_store.steps(folder))

    def open(self, folder: pathlib.Path, **options: Any) -> OrbaxTree:
        """Reads the metadata, of the last step where there are several; options of `OrbaxTree`."""
        outside = folder.absolute().parent
        if outside.name.endswith(commit.SUFFIX):
            raise CheckpointError(f"{outside}: unfinished; convert or save again.")
        if folder.name == manifest.WEIGHTS and (outside / manifest.FILE_NAME).exists():
            raise CheckpointError(
                f"{folder}: the arrays of an fdq checkpoint, without what they mean. Give "
                f"{outside}."
            )
        if orbax_store.is_orbax(folder):
            return OrbaxTree(folder, **options)
        last = folder / orbax_store.steps(folder)[-1]
        return OrbaxTree(last, name=f"{folder.resolve().name}/{last.name}", **options)


ORBAX_TREES = OrbaxTrees()
