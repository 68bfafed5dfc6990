"""A strict reader of one GGUF file, by `pread`: no mmap, nothing trusted.

A file is `GGUF`, a version, the numbers of tensors and of metadata values, the metadata, a list of
tensors (name, sizes, type, offset), and, aligned, their bytes. Everything is little-endian. All
counts and lengths are compared with what is left of the file, and with limits, before memory is
allocated. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

import dataclasses
import math
import os
import re
import stat
import struct
from typing import Any

import numpy as np

from fdq_checkpoints.errors import CheckpointError, nearest, shown
from fdq_checkpoints.readers.open_file import OpenFile

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_TENSORS = 2**15
MAX_VALUES = 2**14
MAX_NAME_LENGTH = 128
MAX_STRING_LENGTH = 2**22
MAX_STRINGS = 2**20  # in all arrays together; numbers are read at once
MAX_ARRAYS = 2**16  # in arrays
MAX_NESTING = 3
MAX_METADATA_BYTES = 2**27
MAX_RANK = 4
MAX_DIMENSION = 2**40
_DOWNLOAD_AGAIN = "Download it again."


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of tensor: `weights` of a row make a block of `nbytes`."""

    name: str
    weights: int
    nbytes: int


# By number, with those that only their sizes are known of here; gguf's `GGML_QUANT_SIZES`.
TYPES: dict[int, BlockType] = {
    number: BlockType(name, weights, nbytes)
    for number, name, weights, nbytes in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2), (28, "F64", 1, 8),
        (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
        (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136),
        (29, "IQ1_M", 256, 56), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    )
}  # fmt: skip

# Metadata of numbers, by the number of their type.
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("<u1"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is: `shape` is that of rows, `[..., out, in]`; `start`, `stop` in bytes."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Size of a row of the last axis."""
        return self.shape[-1] // self.type.weights * self.type.nbytes


class GgufFile(OpenFile):
    """One open GGUF file whose header has been checked; a context manager.

    `metadata` has str, int, float and bool, lists of str, and NumPy arrays of numbers.
    """

    def _open(self) -> None:
        self.metadata, self.tensors = self._read_header()

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of all rows of a tensor: uint8 `[rows, bytes of a row]`."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.path}: no tensor {shown(name)}.{nearest(name, self.tensors)}"
            )
        if not 0 <= start <= stop <= math.prod(tensor.shape[:-1]):
            raise ValueError(f"{self.path}: tensor {shown(name)} has no rows [{start}, {stop}).")
        first, last = (tensor.start + row * tensor.row_bytes for row in (start, stop))
        data = self.read_bytes(first, last, f"tensor {shown(name)}")
        return data.reshape(stop - start, tensor.row_bytes)

    def _error(self, reason: str, hint: str = "") -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason}.{' ' + hint if hint else ''}")

    def _read_header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._error("not a regular file")
        size, beginning = status.st_size, os.pread(self._fd, 64, 0)
        if beginning.startswith(b"version https://git-lfs"):
            raise self._error("a Git LFS pointer, not the file", "Run `git lfs pull` first.")
        if not beginning.startswith(MAGIC):
            raise self._error("not GGUF: it does not begin with 'GGUF'", _DOWNLOAD_AGAIN)
        if size < 24:
            raise self._error(f"truncated: {size} bytes, too short for GGUF", _DOWNLOAD_AGAIN)
        version, tensor_count, value_count = struct.unpack_from("<IQQ", beginning, 4)
        if version not in (2, 3):
            big = struct.unpack_from(">I", beginning, 4)[0] in (1, 2, 3)
            found = "big-endian" if big else f"version {version}"
            raise self._error(f"GGUF of {found}; versions 2 and 3, little-endian, are read")
        if tensor_count > MAX_TENSORS or value_count > MAX_VALUES:
            raise self._error(
                f"{tensor_count} tensors and {value_count} values of metadata, more than "
                f"{MAX_TENSORS} and {MAX_VALUES}"
            )
        cursor = _Cursor(self.path, self._fd, 24, size)
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.name("a key of metadata")
            if key in metadata:
                raise self._error(f"metadata {shown(key)} is there twice")
            metadata[key] = cursor.value(key)
        found = [self._tensor(cursor) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self._error(f"general.alignment = {alignment!r:.40} is not a power of two")
        begin = -(-cursor.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in found:
            if name in tensors:
                raise self._error(f"tensor {shown(name)} is there twice")
            if offset % alignment:
                raise self._error(f"tensor {shown(name)}: offset {offset} is not aligned")
            start = begin + offset
            stop = start + math.prod(shape) // kind.weights * kind.nbytes
            tensors[name] = GgufTensor(name, kind, shape, start, stop)
        self._check_ranges(tensors, size)
        return metadata, tensors

    def _tensor(self, cursor: "_Cursor") -> tuple[str, BlockType, tuple[int, ...], int]:
        name = cursor.name("the name of a tensor")
        (rank,) = cursor.unpack("<I")
        if not 1 <= rank <= MAX_RANK:
            raise self._error(f"tensor {shown(name)}: {rank} dimensions, expected 1 to {MAX_RANK}")
        shape = tuple(reversed(cursor.unpack(f"<{rank}Q")))
        number, offset = cursor.unpack("<IQ")
        kind = TYPES.get(number)
        if kind is None:
            raise self._error(f"tensor {shown(name)}: type {number} is unknown")
        if not all(1 <= dim <= MAX_DIMENSION for dim in shape):
            raise self._error(f"tensor {shown(name)}: shape {shape} is not one of sizes")
        if shape[-1] % kind.weights:
            raise self._error(
                f"tensor {shown(name)}: rows of {shape[-1]} are not whole blocks of {kind.name}, "
                f"which have {kind.weights}"
            )
        return name, kind, shape, offset

    def _check_ranges(self, tensors: dict[str, GgufTensor], size: int) -> None:
        """All inside the file, and none over another; holes are padding."""
        position = 0
        for tensor in sorted(tensors.values(), key=lambda one: (one.start, one.stop)):
            if tensor.start < position:
                raise self._error(f"tensor {shown(tensor.name)}: its bytes overlap another's")
            position = tensor.stop
            if position > size:
                raise self._error(
                    f"tensor {shown(tensor.name)}: truncated: it ends at byte {position}, the file "
                    f"has {size}",
                    _DOWNLOAD_AGAIN,
                )


class _Cursor:
    """Reads metadata from the beginning to its end, in pieces."""

    def __init__(self, path: str, fd: int, position: int, size: int):
        self.path, self._fd, self._size = path, fd, size
        self._buffer, self._at, self._base = b"", 0, position
        self._left = {_STRING: MAX_STRINGS, _ARRAY: MAX_ARRAYS}

    @property
    def position(self) -> int:
        """Bytes of the file read so far."""
        return self._base + self._at

    def take(self, count: int) -> bytes:
        """The next bytes; CheckpointError where the file has not so many."""
        if self._at + count > len(self._buffer):
            position = self.position
            if count > self._size - position:
                raise self._error(f"truncated: {count} bytes at {position} of {self._size}")
            if position + count > MAX_METADATA_BYTES:
                raise self._error(f"more than {MAX_METADATA_BYTES >> 20} MiB of metadata")
            piece = os.pread(self._fd, max(count, 2**20), position)
            if len(piece) < count:
                raise self._error("the file became shorter while it is read")
            self._buffer, self._at, self._base = piece, 0, position
        part = self._buffer[self._at : self._at + count]
        self._at += count
        return part

    def unpack(self, form: str) -> tuple[int, ...]:
        """The next numbers."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def name(self, what: str) -> str:
        """A short printable string."""
        name = self._string(what, MAX_NAME_LENGTH)
        if not name or not name.isprintable() or re.search(r"[/\\]|\.\.", name):
            raise self._error(f"{what} is {shown(name)}, expected printable characters without '/'")
        return name

    def value(self, key: str) -> Any:
        """The value of a key, its type first."""
        (kind,) = self.unpack("<I")
        return self._value(kind, key, 0)

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(key, MAX_STRING_LENGTH)
        if kind == _ARRAY:
            return self._array(key, depth)
        if kind not in _NUMBERS:
            raise self._error(f"metadata {shown(key)} has type {kind}, which is unknown")
        dtype = _NUMBERS[kind]
        number = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        return self._truth(key, number) if kind == _BOOL else number

    def _truth(self, key: str, number: int) -> bool:
        if number > 1:
            raise self._error(f"metadata {shown(key)} is a boolean of {number}")
        return bool(number)

    def _array(self, key: str, depth: int) -> Any:
        kind, count = self.unpack("<IQ")
        if kind in _NUMBERS:
            dtype = _NUMBERS[kind]
            data = np.frombuffer(self.take(count * dtype.itemsize), dtype)
            return data if kind != _BOOL else data != 0
        if kind not in (_STRING, _ARRAY):
            raise self._error(f"metadata {shown(key)}: an array of type {kind}, which is unknown")
        if depth >= MAX_NESTING:
            raise self._error(f"metadata {shown(key)}: arrays in arrays, too deep")
        self._left[kind] -= count
        if self._left[kind] < 0:
            raise self._error(f"metadata {shown(key)}: too many entries, {count}")
        if kind == _ARRAY:
            return [self._array(key, depth + 1) for _ in range(count)]
        return self._strings(key, count)

    def _strings(self, key: str, count: int) -> list[str]:
        """As often `_string`, in a loop of its own: vocabularies are long."""
        found: list[str] = []
        buffer, at = self._buffer, self._at
        for _ in range(count):
            stop = len(buffer) + 1
            if at + 8 <= len(buffer):
                stop = at + 8 + int.from_bytes(buffer[at : at + 8], "little")
            if stop <= len(buffer):
                text = buffer[at + 8 : stop]
                if text.isascii():
                    found.append(text.decode())
                    at = stop
                    continue
            self._at = at
            found.append(self._string(key, MAX_STRING_LENGTH))
            buffer, at = self._buffer, self._at
        self._at = at
        return found

    def _string(self, key: str, longest: int) -> str:
        length = int.from_bytes(self.take(8), "little")
        if length > longest:
            raise self._error(f"{shown(key)}: a string of {length} bytes, more than {longest}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self._error(f"{shown(key)}: a string that is not UTF-8") from None

    def _error(self, reason: str) -> CheckpointError:
        hint = f" {_DOWNLOAD_AGAIN}" if reason.startswith("truncated") else ""
        return CheckpointError(f"{self.path}: {reason}.{hint}")
