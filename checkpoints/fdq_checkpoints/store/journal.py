"""What of an unfinished job is on disk: its journal, and the pieces of the stack in the making."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fdq.formats.qtensor import QTensor
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.store import manifest
from fdq_checkpoints.store.manifest import TensorEntry
from fdq_checkpoints.tree_paths import Path, Tensor

FILE_NAME = "journal"
_PIECES = "pieces"


@dataclasses.dataclass(frozen=True)
class Piece:
    """The file of the matrices up to `stop` of the stack at `path`, after those of the last one."""

    path: Path
    file: str
    stop: int


class Journal:
    """A line of JSON for the job, one for each batch and piece, one for the end.

    `done` are the tensors that were written, `batches` the directories that hold them, `pieces`
    those of the stack that is not; `job` and `files` are what `begin` was told.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._key = path, None
        self._lock = threading.Lock()  # batches are noted by the thread that wrote them
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
            if "file" in line:
                self.pieces.append(Piece(tuple(line["path"]), line["file"], line["stop"]))

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
        """Takes the batches with a stale tensor, and the pieces, out; False if none were left.

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
        if kept:
            self._lines[1:] = kept
            self._take(kept)
        return bool(kept)

    def write_again(self, key: str, job: dict[str, Any], files: Mapping[str, Any]) -> None:
        """Writes anew what is left of it, whole or not at all."""
        self.files = dict(files)
        lines = [{"key": key, "job": job, "files": self.files}, *self._lines[1:]]
        beside = self._path.with_name(self._path.name + ".new")
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)

    def add(self, batches: list[str], tensors: list[TensorEntry]) -> None:
        """A batch of tensors is on disk, in these directories together with all before."""
        written = [manifest.tensor_to_json(entry) for entry in tensors]
        self._append({"batches": batches, "tensors": written})
        self.batches = batches
        self._note(tensors)

    def add_piece(self, piece: Piece) -> None:
        """A piece is on disk."""
        self._append(dataclasses.asdict(piece))
        self.pieces.append(piece)

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
                raise CheckpointError(
                    f"{self._path}: could not be written: {error.strerror}."
                ) from error

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
    """Keeps the matrices of a stack (a layer's experts) that took long, before it is whole.

    A stack may take minutes; `keep`, which should `flush`, is called when a matrix has waited for
    so many `seconds`.
    """

    def __init__(
        self, folder: pathlib.Path, journal: Journal, *, seconds: float, keep: Callable[[], None]
    ):
        self._folder, self._journal, self._keep = folder / _PIECES, journal, keep
        self._seconds = seconds
        self._last = time.monotonic()
        self._written = 0  # matrices of the stack that are on disk
        self._made: tuple[Tensor, Mapping[str, np.ndarray], int] | None = None

    def start_of(self, tensor: Tensor) -> int:
        """How many matrices of a stack an earlier process made."""
        found = itertools.takewhile(self._is_there, self._of(tensor))
        return max((piece.stop for piece in found), default=0)

    def _of(self, tensor: Tensor) -> list[Piece]:
        return [piece for piece in self._journal.pieces if piece.path == tensor.path]

    def _is_there(self, piece: Piece) -> bool:
        return (self._folder / piece.file).is_file()

    def begun(self, tensor: Tensor) -> tuple[dict[str, np.ndarray], int]:
        """The arrays of a quantized stack, filled as far as an earlier process came, and how far.

        `tensor` is abstract.
        """
        assert isinstance(tensor.value, QTensor)
        arrays = {
            name: np.empty(array.shape, array.dtype)
            for name, array in tensor.value.arrays().items()
        }
        start = 0
        for piece in itertools.takewhile(self._is_there, self._of(tensor)):
            with np.load(self._folder / piece.file) as stored:
                for name, array in arrays.items():
                    part = array[start : piece.stop]
                    part[...] = stored[name].view(array.dtype).reshape(part.shape)
            start = piece.stop
        self._written, self._made, self._last = start, None, time.monotonic()
        return arrays, start

    def made(self, tensor: Tensor, arrays: Mapping[str, np.ndarray], stop: int) -> None:
        """The first `stop` matrices of a stack are there."""
        self._made = (tensor, arrays, stop)
        if stop == tensor.value.shape[0]:  # whole, and the next batch has it
            self._made = None
        elif time.monotonic() - self._last >= self._seconds:
            self._keep()

    def flush(self) -> None:
        """Writes what is not on disk yet."""
        if self._made is None or self._made[2] == self._written:
            return
        tensor, arrays, stop = self._made
        self._folder.mkdir(exist_ok=True)
        mark = zlib.crc32("\0".join(tensor.path).encode())
        name = f"{len(self._journal.done)}-{mark:08x}-{stop}.npz"
        # As bytes: NumPy's files know no bfloat16.
        parts = {
            key: np.ascontiguousarray(array[self._written : stop]).reshape(-1).view(np.uint8)
            for key, array in arrays.items()
        }
        with open(self._folder / name, "wb") as file:
            np.savez(file, allow_pickle=False, **parts)
            file.flush()
            os.fsync(file.fileno())
        self._journal.add_piece(Piece(tensor.path, name, stop))
        self._written, self._last = stop, time.monotonic()

    def drop_done(self) -> None:
        """Removes the files of stacks that were written whole."""
        if not self._journal.pieces:
            shutil.rmtree(self._folder, ignore_errors=True)
