"""What of an unfinished job is on disk: its journal, and pieces of what no batch has yet."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.store import manifest
from fdq_checkpoints.store.manifest import TensorEntry
from fdq_checkpoints.tree_paths import Path, Tensor

FILE_NAME, PIECES = "journal", "pieces"
_NEW = FILE_NAME + ".new"
NOTES = (FILE_NAME, _NEW)
"""Files beside the weights that are of use until the end."""

_LOGGER = logging.getLogger("fdq")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where the columns `[start, stop)` of the tensor at `path` are, and their checksum.

    Columns are counted through all matrices of a stack (`columns_of`).
    """

    path: Path
    file: str
    offset: int
    nbytes: int
    start: int
    stop: int
    crc32: int


def columns_of(shape: Sequence[int]) -> int:
    """The columns of all matrices of a tensor together; 1 of what has no matrices."""
    return max(1, math.prod(shape[:-2]) * shape[-1]) if len(shape) > 1 else 1


class Journal:
    """A line of JSON for the job, one for each batch and file of pieces, one for the end.

    `done` are the tensors that were written, `batches` the directories that hold them, `pieces`
    those of tensors that were not; `job` and `files` are what `begin` was told.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._key = path, None
        self._lock = threading.RLock()  # batches are noted by the thread that wrote them
        self.done: list[TensorEntry] = []
        self.batches: list[str] = []
        self.pieces: list[Piece] = []
        self.finished = False
        self.job: dict[str, Any] = {}
        self.files: dict[str, Any] = {}
        self._lines = self._read() if path.is_file() else []
        if not self._lines:
            return
        first = self._lines[0]
        self._key, self.job = first.get("key"), first.get("job", {})
        self.files = first.get("files", {})
        self._take(self._lines[1:])

    def _take(self, lines: list[dict[str, Any]]) -> None:
        self.done, self.batches, self.pieces, self.finished = [], [], [], False
        for line in lines:
            self.finished = "finished" in line
            self.batches = line.get("batches", self.batches)
            written = line.get("tensors", [])
            self._note([manifest.tensor_from_json(entry, str(self._path)) for entry in written])
            for piece in line.get("pieces", []):
                self.pieces.append(Piece(**piece | {"path": tuple(piece["path"])}))

    def is_of(self, key: str) -> bool:
        """Whether an equal job wrote it."""
        return self._key == key

    @property
    def has_work(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self.done or self.pieces)

    def begin(self, key: str, job: dict[str, Any], files: Mapping[str, Any]) -> None:
        """Forgets what an earlier process did; `job` is for people, `files` what is read."""
        self._take([])
        self._key, self.job, self.files = key, job, dict(files)
        self._append({"key": key, "job": job, "files": self.files})

    def forget(self, is_stale: Callable[[Path], bool]) -> bool:
        """Takes batches with a stale tensor out, and pieces of one; False if nothing was left.

        Nothing is written before `write_again`.
        """
        kept, batches, before = [], [], []
        for line in self._lines[1:]:
            if "batches" not in line:
                continue
            new = [name for name in line["batches"] if name not in before]
            before = line["batches"]
            if not any(is_stale(tuple(entry["path"])) for entry in line["tensors"]):
                batches = sorted([*batches, *new])
                kept.append({"batches": batches, "tensors": line["tensors"]})
        pieces = [piece for piece in self.pieces if not is_stale(piece.path)]
        if pieces:
            kept.append({"pieces": list(map(dataclasses.asdict, pieces))})
        if kept:
            self._lines[1:] = kept
            self._take(kept)
        return bool(kept)

    def write_again(self, key: str, job: dict[str, Any], files: Mapping[str, Any]) -> None:
        """Writes anew what is left of it, whole or not at all."""
        self.files = dict(files)
        lines = [{"key": key, "job": job, "files": self.files}, *self._lines[1:]]
        beside = self._path.with_name(_NEW)
        try:
            with open(beside, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise _not_written(self._path, error) from error

    def add(self, batches: list[str], tensors: list[TensorEntry]) -> None:
        """A batch of tensors is on disk, in these directories together with all before."""
        written = [manifest.tensor_to_json(entry) for entry in tensors]
        with self._lock:
            self._append({"batches": batches, "tensors": written})
            self.batches = batches
            self._note(tensors)

    def add_pieces(self, pieces: list[Piece]) -> None:
        """These are on disk."""
        with self._lock:
            self._append({"pieces": [dataclasses.asdict(piece) for piece in pieces]})
            self.pieces += pieces

    def finish(self) -> None:
        """All is put together where it belongs."""
        self._append({"finished": True})
        self.finished = True

    def _note(self, tensors: list[TensorEntry]) -> None:
        self.done += tensors
        paths = {entry.path for entry in tensors}
        self.pieces = [piece for piece in self.pieces if piece.path not in paths]

    def _append(self, content: dict[str, Any]) -> None:
        data = (json.dumps(content) + "\n").encode()
        with self._lock, open(self._path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError as error:
                os.ftruncate(file.fileno(), size)  # no line begins in another's middle
                raise _not_written(self._path, error) from error

    def _read(self) -> list[dict[str, Any]]:
        lines, good, data = [], 0, self._path.read_bytes()
        for line in data.splitlines(keepends=True):
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if not isinstance(content, dict):  # the process was killed while it wrote this line
                break
            lines.append(content)
            good += len(line)
        if good < len(data):
            os.truncate(self._path, good)
        return lines


class Pieces:
    """Keeps what took long and is in no batch: whole tensors, and columns of the one in the making.

    A batch is written when it is large, and a matrix may take minutes; `keep`, which should
    `flush`, is called when something has waited for so many `seconds` (or 4 times what its writing
    takes).
    """

    def __init__(
        self,
        folder: pathlib.Path,
        journal: Journal,
        *,
        seconds: float = math.inf,
        keep: Callable[[], None] = lambda: None,
    ):
        self._folder, self._journal, self._keep = folder / PIECES, journal, keep
        self._seconds, self._took, self._last = seconds, 0.0, time.monotonic()
        self._written: dict[Path, int] = {}  # columns that are on disk
        self._sound: dict[Piece, bool] = {}
        self._told = False  # that none can be kept
        self._made: tuple[Tensor, Mapping[str, np.ndarray], int] | None = None

    def start_of(self, tensor: Tensor) -> int:
        """How many columns of a tensor an earlier process made; all, if it was whole."""
        found = self._chain(tensor)
        self._written[tensor.path] = found[-1].stop if found else 0
        return self._written[tensor.path]

    def columns(self) -> dict[Path, int]:
        """How many columns of tensors that no batch has are on disk, and sound."""
        found: dict[Path, int] = {}
        for piece in self._journal.pieces:
            if piece.start == found.get(piece.path, 0) and self._is_sound(piece):
                found[piece.path] = piece.stop
        return found

    def _chain(self, tensor: Tensor) -> list[Piece]:
        """Its pieces from the first column on, as far as none is missing or damaged."""
        found: list[Piece] = []
        for piece in self._journal.pieces:
            stop = found[-1].stop if found else 0
            if piece.path == tensor.path and piece.start == stop and self._is_sound(piece):
                found.append(piece)
        return found

    def _is_sound(self, piece: Piece) -> bool:
        if piece not in self._sound:
            data = self._bytes(piece)
            self._sound[piece] = len(data) == piece.nbytes and zlib.crc32(data) == piece.crc32
        return self._sound[piece]

    def _bytes(self, piece: Piece) -> bytes:
        try:
            with open(self._folder / piece.file, "rb") as file:
                file.seek(piece.offset)
                return file.read(piece.nbytes)
        except FileNotFoundError:
            return b""

    def begun(self, tensor: Tensor) -> dict[str, np.ndarray]:
        """A tensor's arrays, filled as far as an earlier process came; `tensor` is abstract."""
        kinds = tree_paths.arrays_of(tensor.value).items()
        arrays = {name: np.empty(array.shape, array.dtype) for name, array in kinds}
        for piece in self._chain(tensor):
            data, at = self._bytes(piece), 0
            for part in _parts(arrays, tensor.value.shape, piece.start, piece.stop):
                stored = np.frombuffer(data, part.dtype, part.size, at)
                part[...] = stored.reshape(part.shape)
                at += part.nbytes
        return arrays

    def made(self, tensor: Tensor, arrays: Mapping[str, np.ndarray], stop: int) -> None:
        """The first `stop` columns of a tensor are there."""
        whole = stop == columns_of(tensor.value.shape)
        self._made = None if whole else (tensor, arrays, stop)  # a batch gets the whole

    def tick(self) -> None:
        """Keeps what is there, if that was some time ago; to be called again and again."""
        if time.monotonic() - self._last >= max(self._seconds, 4 * self._took):
            self._keep()

    def flush(
        self, waiting: Iterable[tuple[Path, tuple[int, ...], Mapping[str, np.ndarray]]] = ()
    ) -> None:
        """Writes what is not on disk yet: `waiting` (path, shape, arrays) and the one begun."""
        begin = time.monotonic()
        todo = [(path, shape, arrays, columns_of(shape)) for path, shape, arrays in waiting]
        if self._made is not None:
            tensor, arrays, stop = self._made
            todo.append((tensor.path, tuple(tensor.value.shape), arrays, stop))
        todo = [one for one in todo if one[3] > self._written.get(one[0], 0)]
        if todo:
            try:
                self._journal.add_pieces(self._write(todo))
                self._written |= {path: stop for path, _, _, stop in todo}
            except CheckpointError as error:  # no room beside the batches, say
                if not self._told:
                    _LOGGER.warning("%s A kill loses what is in no batch yet.", error)
                self._told = True
        self._last = time.monotonic()
        self._took = self._last - begin

    def _write(
        self, todo: list[tuple[Path, tuple[int, ...], Mapping[str, np.ndarray], int]]
    ) -> list[Piece]:
        number = max(map(int, self._files()), default=-1) + 1
        pieces, name = [], self._folder / str(number)
        try:
            self._folder.mkdir(exist_ok=True)
            with open(name, "xb") as file:
                for path, shape, arrays, stop in todo:
                    start, offset, crc = self._written.get(path, 0), file.tell(), 0
                    for part in _parts(arrays, shape, start, stop):
                        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                        crc = zlib.crc32(data, crc)
                        file.write(data)
                    size = file.tell() - offset
                    pieces.append(Piece(path, str(number), offset, size, start, stop, crc))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                name.unlink()
            raise _not_written(name, error) from error
        self._sound |= dict.fromkeys(pieces, True)
        return pieces

    def _files(self) -> set[str]:
        """Names of those that are there; what else somebody put there is left alone."""
        there = os.listdir(self._folder) if self._folder.is_dir() else []
        return {name for name in there if name.isascii() and name.isdecimal()}

    def drop_done(self) -> None:
        """Removes the files of what batches have."""
        if not self._folder.is_dir():
            return
        wanted = {piece.file for piece in self._journal.pieces}
        for name in self._files() - wanted:
            (self._folder / name).unlink()
        if not wanted:
            shutil.rmtree(self._folder, ignore_errors=True)


def _not_written(path: pathlib.Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: could not be written: {error.strerror}.")


def _parts(
    arrays: Mapping[str, np.ndarray], shape: Sequence[int], start: int, stop: int
) -> Iterator[np.ndarray]:
    """Views of the arrays: what belongs to the columns `[start, stop)` of a tensor of `shape`."""
    if start == 0 and stop == columns_of(shape):
        yield from arrays.values()
        return
    n = shape[-1]
    for index in range(start // n, -(-stop // n)):
        first, last = max(start - index * n, 0), min(stop - index * n, n)
        for array in arrays.values():
            matrix = array if len(shape) == 2 else array[index]
            # Scales of blocks are fewer than columns, and no block is in two parts.
            width = matrix.shape[-1]
            yield matrix[..., first * width // n : last * width // n]
