"""Writes safetensors files whose tensors are known beforehand: each where it belongs, in any order.

Format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable

import numpy as np

from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers.file_names import INDEX_NAME
from fdq_checkpoints.readers.safetensors_reader import DTYPES, MAX_NAME_LENGTH

WHOLE = "model.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """The files of a folder, and their index where there are several; a context manager.

    Leaving it raises CheckpointError where a tensor was planned and not written.
    """

    def __init__(self, folder: pathlib.Path, planned: Iterable[Planned], *, shard_bytes: int):
        self._folder = folder
        self._planned = {one.name: one for one in planned}
        self._left = set(self._planned)
        self._places: dict[str, tuple[int, int]] = {}  # file, first byte
        self._descriptors: list[int] = []
        self._shards = _shards(self._planned.values(), shard_bytes)

    def __enter__(self) -> "SafetensorsWriter":
        names = _file_names(len(self._shards))
        for number, (name, tensors) in enumerate(zip(names, self._shards, strict=True)):
            # The widest first, or a reader's views of its bytes would not be aligned.
            tensors.sort(key=lambda one: (-one.dtype.itemsize, one.name))
            descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._descriptors.append(descriptor)
            header = _header(tensors)
            write_at(descriptor, header, 0)
            position = len(header)
            for one in tensors:
                self._places[one.name] = number, position
                position += one.nbytes
            os.ftruncate(descriptor, position)
        if len(names) > 1:
            where = {one: names[number] for one, (number, _) in sorted(self._places.items())}
            total = sum(one.nbytes for one in self._planned.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        return self

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor, of the dtype and shape that were planned."""
        planned = self._planned[name]
        if (array.dtype, array.shape) != (planned.dtype, planned.shape):
            raise CheckpointError(
                f"{shown(name)}: {array.dtype} {array.shape}, planned were {planned.dtype} "
                f"{planned.shape}."
            )
        number, start = self._places[name]
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        write_at(self._descriptors[number], memoryview(flat), start)
        self._left.discard(name)

    def __exit__(self, kind: object, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        if kind is None and self._left:
            raise CheckpointError(f"{shown(min(self._left))}: planned and not written.")


def write_at(descriptor: int, data: bytes | memoryview, start: int) -> None:
    """Writes all bytes at a place of a file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + 2**26], start + done)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WHOLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _shards(planned: Iterable[Planned], limit: int) -> list[list[Planned]]:
    """Tensors in the order of the model, at most `limit` bytes a shard unless it is one tensor."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for one in planned:
        if len(one.name) > MAX_NAME_LENGTH:
            raise CheckpointError(f"{shown(one.name)}: a name of {len(one.name)} characters.")
        if shards[-1] and size + one.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.nbytes
    return shards


def _header(tensors: list[Planned]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for one in tensors:
        stop = position + one.nbytes
        shape, offsets = list(one.shape), [position, stop]
        content[one.name] = {
            "dtype": _NAMES[one.dtype],
            "shape": shape,
            "data_offsets": offsets,
        }
        position = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
