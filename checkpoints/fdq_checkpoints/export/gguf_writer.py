"""Writes GGUF files (version 3) whose tensors are known beforehand: each where it belongs.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.export.safetensors_writer import write_at
from fdq_checkpoints.readers.gguf_reader import DEFAULT_ALIGNMENT, MAGIC, TYPES

_VERSION = 3
_NUMBERS = {name: number for number, name in ((n, kind.name) for n, kind in TYPES.items())}
_BLOCKS = {kind.name: kind for kind in TYPES.values()}
# Types of metadata.
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT32 = 4, 6, 7, 8, 9, 5


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that will be written: rows `[..., out, in]` of a type."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        block = _BLOCKS[self.type]
        return math.prod(self.shape) // block.weights * block.nbytes


class GgufWriter:
    """One file; a context manager.

    Leaving it raises CheckpointError where a part of a tensor was planned and not written.
    """

    def __init__(self, path: pathlib.Path, metadata: Mapping[str, Any], planned: Iterable[Planned]):
        self._path, self._planned = path, {one.name: one for one in planned}
        self._left = {one.name: one.nbytes for one in self._planned.values()}
        head, infos, offset = header(metadata, len(self._planned)), b"", 0
        self._starts: dict[str, int] = {}
        for one in self._planned.values():
            sizes = one.shape[::-1]
            infos += _text(one.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
            infos += struct.pack("<IQ", _NUMBERS[one.type], offset)
            self._starts[one.name] = offset
            offset += _aligned(one.nbytes)
        self._head = (head + infos).ljust(_aligned(len(head) + len(infos)), b"\0")
        self._size = len(self._head) + offset
        self._descriptor = -1

    def __enter__(self) -> "GgufWriter":
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(self._path, flags, 0o644)
        write_at(self._descriptor, self._head, 0)
        os.ftruncate(self._descriptor, self._size)
        return self

    def write(self, name: str, data: np.ndarray, index: int = 0) -> None:
        """Writes a tensor, or the `index`th of as many equal parts as it takes to fill it."""
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        start = self._starts[name] + index * flat.size
        if self._planned[name].nbytes % flat.size or index * flat.size >= (
            self._planned[name].nbytes
        ):
            raise CheckpointError(f"{shown(name)}: part {index} of {flat.size} bytes is no part.")
        write_at(self._descriptor, memoryview(flat), len(self._head) + start)
        self._left[name] -= flat.size

    def __exit__(self, kind: object, *_: object) -> None:
        os.close(self._descriptor)
        missing = [name for name, left in self._left.items() if left]
        if kind is None and missing:
            raise CheckpointError(f"{shown(missing[0])}: planned and not written.")


def header(metadata: Mapping[str, Any], tensors: int) -> bytes:
    """The beginning of a file, and its metadata: strings, numbers and lists of them."""
    values = b"".join(_text(key) + _value(value) for key, value in metadata.items())
    return MAGIC + struct.pack("<IQQ", _VERSION, tensors, len(metadata)) + values


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind, _ = _kind(value[0] if value else "")
        content = b"".join(_kind(one)[1] for one in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + content
    if isinstance(value, np.ndarray):
        kind = {"f": _FLOAT32, "i": _INT32}[value.dtype.kind]
        content = value.astype("<f4" if kind == _FLOAT32 else "<i4").tobytes()
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + content
    kind, content = _kind(value)
    return struct.pack("<I", kind) + content


def _kind(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<B", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    return _STRING, _text(value)
