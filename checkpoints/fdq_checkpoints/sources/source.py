"""What a source of weights is: an importer says which directories are its own, and opens them."""

import abc
import os
import pathlib
from typing import Any, Protocol

import numpy as np

from fdq import models
from fdq.formats.qtensor import QTensor
from fdq.registry import Registry
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.hub import origin
from fdq_checkpoints.readers.local_directory import gguf_parts
from fdq_checkpoints.sources.runs import checkpoint_directory
from fdq_checkpoints.tree_paths import Path

_NOTES = (".md", ".txt", ".png", ".jpg", ".pdf")


class Source(abc.ABC):
    """An open checkpoint of somebody's; a context manager.

    `tree` is an `fdq.models.Decoder` (then `config` is its config) or nested dicts, of
    `jax.ShapeDtypeStruct` s (floats) and abstract QTensors.
    """

    folder: pathlib.Path
    tree: Any
    config: models.DecoderConfig | None = None
    # A checkpoint of what a model has besides the tensors of its config; copied as it is.
    adapters: pathlib.Path | None = None

    @abc.abstractmethod
    def read(self, path: Path, index: int | None = None) -> np.ndarray | QTensor:
        """The tensor at `path` as it is stored, or `tensor[index]` of a stack."""

    # Whether several threads may read at a time.
    concurrent: bool = False

    def has_columns(self, path: Path) -> bool:
        """Whether `read_columns` reads no more than it gives."""
        del path
        return False

    def read_columns(self, path: Path, index: int | None, start: int, stop: int) -> np.ndarray:
        """Columns `[start, stop)` of the last axis of a matrix of floats."""
        found = self.read(path, index)
        assert isinstance(found, np.ndarray)
        return found[..., start:stop]

    def not_finite(self, path: Path, index: int | None) -> str | None:
        """Where in the source's files the first NaN or infinity of a tensor is; None without."""
        del path, index
        return None

    def files_of(self, path: Path) -> list[pathlib.Path]:
        """The files that a tensor is read from; all that have weights where it is not known."""
        del path
        return self.weight_files()

    def weight_files(self) -> list[pathlib.Path]:
        """All files that hold weights, or say where they are: but for notes and hidden files."""
        if not self.folder.is_dir():
            return gguf_parts(self.folder)
        return sorted(
            path
            for path in self.folder.glob("**/*")
            if path.is_file() and path.suffix.lower() not in _NOTES and path.name[0] != "."
        )

    def decoded(self) -> "Source":
        """The same in floats where it holds somebody's codes, which another scheme is made of."""
        return self

    @property
    def name(self) -> str:
        """What to call it in the provenance of what is made of it."""
        return origin(self.folder) or self.folder.resolve().name

    def companions(self) -> list[pathlib.Path]:
        """Files to copy beside the converted weights, such as tokenizer.json."""
        return []

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Lets go of open files."""

    @property
    def identity(self) -> list[Any]:
        """JSON values that are equal for the same part of the same source."""
        return [str(self.folder.resolve())]

    def key_of(self, path: pathlib.Path) -> str:
        """A file of the source by its name in it."""
        return str(path.relative_to(self.folder)) if self.folder.is_dir() else path.name

    def states(self) -> dict[str, list[int]]:
        """By name of a file of weights, numbers that are equal as long as nobody touched it."""
        found = {}
        for path in self.weight_files():
            status = path.stat()
            found[self.key_of(path)] = [status.st_size, status.st_mtime_ns]
        return found

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Importer(Protocol):
    """One kind of checkpoint that fdq reads; a member of `SOURCES`, which users may add to."""

    @property
    def name(self) -> str:
        """What it reads, in a word or two."""
        ...

    def claims(self, folder: pathlib.Path) -> bool:
        """Whether a directory is of this kind; looks at names and config.json, reads no weights."""
        ...

    def open(self, folder: pathlib.Path, *, dtype: Any = None) -> Source:
        """Opens a directory that it claims; CheckpointError says what is wrong with it, and where.

        `dtype` is that of a model's tensors that are not quantized; by default that of the source.
        """
        ...


SOURCES: Registry[Importer] = Registry("source")
"""Asked from the last to the first whether a directory is theirs: what users add before what is
here. The first one takes whatever nobody else claims, and says why it cannot."""


def importer_of(folder: pathlib.Path) -> Importer:
    """The importer that claims a directory."""
    return next(one for one in reversed(list(SOURCES.values())) if one.claims(folder))


def open_source(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    config: Any = None,
    subtree: str | None = None,
) -> Source:
    """Opens a directory by whichever importer claims it; arguments as of `fdq.convert`."""
    folder = checkpoint_directory(path)
    importer = importer_of(folder)
    given = {"config": config, "subtree": subtree}
    options = {name: value for name, value in given.items() if value is not None}
    if options and not getattr(importer, "takes_trees", False):
        raise CheckpointError(f"{folder}: config= and subtree= are for Orbax checkpoints.")
    return importer.open(folder, dtype=dtype, **options)


class TreeSource(Source):
    """A source of the tensors of a tree, or of a part of it, each of which is read whole.

    Derived classes say by `_read` how.
    """

    _subtree: str | None = None
    _last: tuple[Path, Any] | None = None

    def read(self, path: Path, index: int | None = None) -> Any:
        """The tensor at `path`, or `tensor[index]` (the tensor is kept for the next index)."""
        if index is None:
            self._last = None
            return self._read(path)
        if self._last is None or self._last[0] != path:
            self._last = None
            self._last = (path, self._read(path))
        return self._last[1][index]

    def _read(self, path: Path) -> Any:
        raise NotImplementedError

    @property
    def identity(self) -> list[Any]:
        """The subtree as well."""
        return [self._subtree, *super().identity]
