"""Trees of arrays in Orbax's format; the only module of the project that knows Orbax.

Arrays are written uncompressed (packed codes do not compress, and zstd is three to five times
slower) and read back in exactly the stored dtype and shape, because Orbax casts silently to
whatever the caller asks for. Trees are nested dicts only; one larger than memory is written in
batches (`ocp.partial`).
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.store.said_once import said_once

# The cost of a partial save grows with the number of those before it, so there are at most 64
# (and one remainder). A batch stays in memory until it is written, and the next beside it.
MAX_BATCHES = 64
MIN_BATCH_BYTES = 64 * 2**20

_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax renames what is complete
_TREE, _CHECKPOINT = "_METADATA", "_CHECKPOINT_METADATA"  # what it writes beside either

# Whoever wants a part of an array reads the pieces that it is in, and no more.
PIECE_BYTES = 4 * 2**20

# What Orbax and its parsers raise on a damaged directory: it documents none, these were seen.
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError, RuntimeError)


class TreeWriter:
    """Writes a tree of `total_bytes` array by array; nothing is at `path` before `finalize`.

    A batch is written while the next one is gathered. `on_batch` gets after each, in a thread of
    its own, the names of the directories beside `path` that hold all so far, and what was noted
    (`note`) since the batch before. With it, a process that is killed in `finalize` leaves all
    batches as they were.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        total_bytes: int,
        on_batch: Callable[[list[str], list[Any]], None] | None = None,
    ):
        self._path = path.absolute()
        self._limit = max(MIN_BATCH_BYTES, -(-total_bytes // MAX_BATCHES))
        self._on_batch = on_batch
        self._batch: dict[tree_paths.Path, np.ndarray] = {}
        self._batch_bytes = 0
        self._notes: list[Any] = []
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "fdq-writer")
        self._writing: concurrent.futures.Future[None] | None = None
        self._failed: Exception | None = None
        self._batches = 0

    def add(self, path: tree_paths.Path, array: Any) -> None:
        """Queue one array (not of size zero, which Orbax cannot write)."""
        host = np.asarray(array)
        self._batch[path] = host
        self._batch_bytes += host.nbytes

    def note(self, note: Any) -> None:
        """Something to be told of with the batch that has what was added last."""
        self._notes.append(note)

    def flush_if_full(self) -> None:
        """Write the batch when it is large enough; call it between whole tensors."""
        if self._batch_bytes >= self._limit:
            self.cut()

    def waiting(self) -> tuple[list[Any], dict[tree_paths.Path, np.ndarray]]:
        """The notes and the arrays that are in no batch yet."""
        return list(self._notes), dict(self._batch)

    def make_room(self, nbytes: int) -> None:
        """Write the batch before something large is gathered: or both would be in memory."""
        if nbytes >= self._limit // 2 and self._batch_bytes >= self._limit // 4:
            self.cut()
        if nbytes >= self._limit:
            self._wait()

    def part(self) -> None:
        """Write the batch, as long as batches are few: there is a reason to part it from others."""
        if self._batches < MAX_BATCHES:
            self.cut()

    def flush(self) -> None:
        """Write the batch, and wait until it is on disk."""
        self.cut()
        self._wait()

    def cut(self) -> None:
        """Begin to write the batch, when the one before is written."""
        self._wait()
        if self._failed is not None:  # or a later batch would be noted, without this one
            raise self._failed
        if not self._batch:
            return
        self._batches += 1
        batch, notes = self._batch, self._notes
        self._batch, self._notes, self._batch_bytes = {}, [], 0
        self._writing = self._thread.submit(self._write, batch, notes)
        if jax.process_count() > 1:
            self._wait()  # collectives of two threads would come in another order elsewhere

    def _wait(self) -> None:
        """CheckpointError of the last batch, where it could not be written."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except Exception as error:
            self._failed = error
            raise
        self._writing = None

    def close(self) -> None:
        """Wait for the batch in the making, whatever becomes of it."""
        self._thread.shutdown(wait=True)

    def _write(self, batch: dict[tree_paths.Path, np.ndarray], notes: list[Any]) -> None:
        with _writing(self._path):
            ocp.partial.save(str(self._path), tree_paths.nested(batch))
        if self._on_batch is not None:
            self._on_batch(pending_directories(self._path), notes)

    def finalize(self) -> None:
        """Write what is left and put everything together at `path`."""
        self.flush()
        self._thread.shutdown()
        # Orbax merges the batches in place: of a process that is killed meanwhile nothing is left.
        path = self._path
        if self._on_batch is not None and jax.process_count() == 1:
            path = _linked(self._path) or path
        with _writing(self._path):
            ocp.partial.finalize(str(path))
        if path != self._path:
            path.rename(self._path)
            shutil.rmtree(_partial(self._path))


def pending_directories(path: pathlib.Path) -> list[str]:
    """Names of the committed batches that an unfinished writer of `path` left."""
    folder = _partial(path)
    if not folder.is_dir():
        return []
    return sorted(name for name in os.listdir(folder) if not name.endswith(_UNFINISHED))


def keep_only(path: pathlib.Path, batches: list[str]) -> bool:
    """Prepare to go on after a killed writer: drop all that it left but `batches`.

    False, and nothing dropped, if one is missing (it was killed while putting them together).
    """
    folder = _partial(path)
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    if not set(batches) <= present:
        return False
    for name in present - set(batches):
        shutil.rmtree(folder / name)
    for entry in path.parent.iterdir():
        if entry.name.startswith(path.name) and entry.name.endswith(_UNFINISHED):
            shutil.rmtree(entry)
    for copy in (_copy(path), _partial(_copy(path))):
        shutil.rmtree(copy, ignore_errors=True)
    return True


def drop_batches(path: pathlib.Path) -> None:
    """Remove what a process that was killed left beside a tree that is whole."""
    for entry in (_partial(path), _copy(path), _partial(_copy(path))):
        if entry.is_dir():
            shutil.rmtree(entry)


def _linked(path: pathlib.Path) -> pathlib.Path | None:
    """A path whose batches are those of `path`, by hard links; None where there are no links.

    Files of data are never written again; what else there is, is small and copied.
    """
    copy = _copy(path)

    def link(source: str, destination: str) -> None:
        if pathlib.Path(source).parent.name == "d":
            os.link(source, destination)
        else:
            shutil.copyfile(source, destination)

    try:
        shutil.copytree(_partial(path), _partial(copy), copy_function=link)
    except (OSError, shutil.Error):
        shutil.rmtree(_partial(copy), ignore_errors=True)
        return None
    return copy


def _copy(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".whole")


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial_save")


def is_orbax(path: str | os.PathLike[str]) -> bool:
    """Whether the directory is one that Orbax wrote, with any of its APIs."""
    folder = pathlib.Path(path)
    return folder.is_dir() and any(
        (folder / name).exists() for name in (_CHECKPOINT, _TREE, "orbax.checkpoint")
    )


class TreeReader:
    """Reads arrays of one checkpoint; shapes and dtypes (`metadata`) it looks at once.

    Where a checkpoint has several trees (items of a CheckpointManager, checkpointables), their
    names lead the paths. Numbers are arrays without axes; what is neither is in `others`, by path
    the name of its type.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path.absolute()
        if not self._path.is_dir():
            raise CheckpointError(f"{path}: missing, or not a directory.")
        self._path, items = _items(self._path)
        self._trees: list[tuple[str | None, list[tree_paths.Path], list[Any], Any]] = []
        self.metadata: dict[tree_paths.Path, jax.ShapeDtypeStruct] = {}
        self.others: dict[tree_paths.Path, str] = {}
        for item in items:
            with _reading(self._path):
                tree = ocp.metadata(str(self._path), checkpointable_name=item).metadata
            leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
            prefix = (str(item),) if len(items) > 1 else ()
            names = [(*prefix, *tree_paths.path_of(entries)) for entries, _ in leaves]
            self._trees.append((item, names, [leaf for _, leaf in leaves], structure))
            for name, (_, leaf) in zip(names, leaves, strict=True):
                if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
                    self.metadata[name] = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
                elif isinstance(leaf, bool | int | float):
                    self.metadata[name] = jax.ShapeDtypeStruct((), np.asarray(leaf).dtype)
                else:
                    self.others[name] = type(leaf).__name__

    def read(
        self,
        names: Iterable[tree_paths.Path],
        shardings: Mapping[tree_paths.Path, jax.sharding.Sharding] | None = None,
    ) -> dict[tree_paths.Path, Any]:
        """Some arrays, in exactly their stored dtype and shape: on the host, or as `shardings` say.

        With shardings, which all processes give for the same arrays, each reads what its devices
        have.
        """
        wanted, shardings = set(names), shardings or {}
        if unknown := wanted - self.metadata.keys():
            name = tree_paths.dotted(min(unknown))
            raise CheckpointError(f"{self._path}: there is no stored array {name}.")
        result = {}
        for item, paths, leaves, structure in self._trees:
            if not wanted.intersection(paths):
                continue
            targets = [
                self._target(name, leaf, shardings.get(name)) if name in wanted else ocp.PLACEHOLDER
                for name, leaf in zip(paths, leaves, strict=True)
            ]
            with _reading(self._path):
                template = jax.tree.unflatten(structure, targets)
                tree = ocp.load(str(self._path), template, checkpointable_name=item)
            for name, value in zip(paths, jax.tree.leaves(tree), strict=True):
                if name in wanted:
                    result[name] = self._checked(name, value)
        return result

    def _target(self, name: tree_paths.Path, leaf: Any, sharding: Any) -> Any:
        """What asks Orbax for a leaf as it is stored."""
        if isinstance(leaf, bool | int | float):
            return leaf
        stored = self.metadata[name]
        if sharding is not None:
            return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)
        # A broadcast zero has the shape and the dtype without the memory.
        return np.broadcast_to(np.zeros((), stored.dtype), stored.shape)

    def _checked(self, name: tree_paths.Path, value: Any) -> Any:
        is_part = isinstance(value, jax.Array) and not value.is_fully_addressable
        array, stored = value if is_part else np.asarray(value), self.metadata[name]
        if array.shape != stored.shape or array.dtype != stored.dtype:
            raise CheckpointError(
                f"{self._path}: {tree_paths.dotted(name)} was read as {array.dtype} "
                f"{array.shape}, but stored is {stored.dtype} {stored.shape}."
            )
        return array


def _items(path: pathlib.Path) -> tuple[pathlib.Path, list[str | None]]:
    """Where Orbax wants to be asked for a tree at `path`, and the names of the trees there.

    A tree without a name is None. `path` may be the directory of one item: its parent is asked.
    """
    if (path / _TREE).exists():
        is_item = not (path / _CHECKPOINT).exists() and (path.parent / _CHECKPOINT).exists()
        return (path.parent, [path.name]) if is_item else (path, [None])
    names = sorted(entry.parent.name for entry in path.glob(f"*/{_TREE}"))
    return path, [*names] or ["AUTO"]


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _pieces
    # Orbax would copy every NumPy array before writing; our saves are synchronous.
    context.memory.deepcopy_host_arrays = False
    return context


def _pieces(key: Any, value: Any) -> Any:
    """How Orbax cuts an array; one whose longest axis is a prime, or nearly so, it shall not.

    It divides the longest axis by its least divisor until a piece is small enough: of a vocabulary
    of 32,003 tokens each would be a piece.
    """
    del key
    piece, size = list(value.shape), value.nbytes
    while size > PIECE_BYTES:
        longest = piece.index(max(piece))
        divisor = next((n for n in range(2, 64) if piece[longest] % n == 0), None)
        if divisor is None:
            return None
        piece[longest] //= divisor
        size //= divisor
    if size == value.nbytes:
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=PIECE_BYTES)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        with _context(), said_once():
            yield
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: could not be written: {_reason(error)}.") from error


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    try:
        with _context(), said_once():
            yield
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path}: Orbax cannot read it, files are missing or damaged ({_reason(error)}). "
            "Copy or convert the checkpoint again."
        ) from error


def _reason(error: Exception) -> str:
    """One line; of the operating system's errors, which come in several others, its own words."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0][:300].rstrip(".") if str(error) else type(error).__name__


def steps(path: pathlib.Path) -> list[str]:
    """Names of the finished steps that a training run keeps in the directory, oldest first.

    They end in a number (`7`, `checkpoint_7`, `step_00000007`).
    """
    if not path.is_dir():
        return []
    numbers = {
        entry.name: int(match[1])
        for entry in path.iterdir()
        if (match := re.fullmatch(r"(?:.*[^0-9])?([0-9]+)", entry.name))
        and _UNFINISHED not in entry.name
        and is_orbax(entry)
    }
    return sorted(numbers, key=lambda name: numbers[name])
