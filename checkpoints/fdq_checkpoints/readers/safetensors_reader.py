"""A strict reader of safetensors files, by `pread`: no mmap, no pickle, nothing trusted.

A file is an 8-byte little-endian header length, a JSON header `name -> {dtype, shape,
data_offsets}`, and the tensors' bytes. The header is checked against the file's size before any
memory is allocated.
Format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import math
import os
import stat
import struct
from typing import Any

import ml_dtypes
import numpy as np

from fdq_checkpoints.errors import CheckpointError, nearest, shown
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.open_file import OpenFile

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
# Of one file: what is hostile is to be refused within two seconds and a gigabyte of memory. The
# shards of the largest models have some thousand tensors each.
MAX_HEADER_BYTES = 2**25
MAX_TENSORS = 2**16
MAX_NAME_LENGTH = 512
MAX_RANK = 8
MAX_DIMENSION = 2**40
_DOWNLOAD_AGAIN = "Download it again."

_PICKLES = (b"\x02", b"\x03", b"\x04", b"\x05")
_OTHER_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file. Run `git lfs pull` first"),
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle?). Convert it to safetensors"),
    *((b"\x80" + version, "a Python pickle. Convert it to safetensors") for version in _PICKLES),
    (b"GGUF", "a GGUF file. Give it a name that ends in .gguf"),
    (b"\x1f\x8b", "a gzip archive. Unpack it first"),
)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: `start` and `stop` are byte offsets in the file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.stop - self.start


class SafetensorsFile(OpenFile):
    """One open safetensors file whose header has been checked; a context manager."""

    def _open(self) -> None:
        self.metadata, self.tensors = self._read_header()

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in its stored dtype."""
        info = self._info(name)
        return self._read_bytes(info, 0, info.nbytes).view(info.dtype).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `[start, stop)` of the first dimension, without reading the others."""
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(
                f"{self.path}: tensor {shown(name)} of shape {info.shape} has no rows "
                f"[{start}, {stop})."
            )
        row_bytes = info.dtype.itemsize * math.prod(info.shape[1:])
        data = self._read_bytes(info, start * row_bytes, stop * row_bytes)
        return data.view(info.dtype).reshape((stop - start, *info.shape[1:]))

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {shown(name)}.{nearest(name, self.tensors)}"
            ) from None

    def _read_bytes(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        return self.read_bytes(info.start + start, info.start + stop, f"tensor {shown(info.name)}")

    def _error(self, reason: str, name: str | None = None, hint: str = "") -> CheckpointError:
        tensor = "" if name is None else f" tensor {shown(name)}:"
        return CheckpointError(f"{self.path}:{tensor} {reason}.{' ' + hint if hint else ''}")

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise self._error("not a regular file")
        size = status.st_size
        beginning = os.pread(self._fd, 64, 0)
        for magic, what in _OTHER_KINDS:
            if beginning.startswith(magic):
                raise self._error(f"not safetensors but {what}")
        if size < 8:
            raise self._error(f"{size} bytes, too short for safetensors", hint=_DOWNLOAD_AGAIN)
        (length,) = struct.unpack("<Q", beginning[:8])
        if not 0 < length <= MAX_HEADER_BYTES:
            raise self._error(f"header length {length} is not in 1…{MAX_HEADER_BYTES}")
        if 8 + length > size:
            reason = f"truncated: the header needs {8 + length} bytes, the file has {size}"
            raise self._error(reason, hint=_DOWNLOAD_AGAIN)
        header_bytes = os.pread(self._fd, length, 8)
        if not header_bytes.startswith(b"{"):
            raise self._error("the header does not begin with '{'")
        # Before it is parsed: an entry has one object and ten quotes.
        if header_bytes.count(b"{") > MAX_TENSORS + 2 or header_bytes.count(b'"') > 2**21:
            raise self._error(f"a header of more than {MAX_TENSORS} tensors")
        header: dict[str, Any] = strict_json.parse(header_bytes, where=f"{self.path}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise self._error("__metadata__ is not an object of strings")
        data_start = 8 + length
        tensors = {
            name: self._check_entry(name, entry, data_start) for name, entry in header.items()
        }
        self._check_ranges(tensors, data_start, size)
        return metadata, tensors

    def _check_entry(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        forbidden = any(part in name for part in ("/", "\\", ".."))
        if forbidden or not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
            reason = "illegal name (1 to 512 printable characters without '/', '\\' and '..')"
            raise self._error(reason, name)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            reason = f"header entry must have exactly dtype, shape, data_offsets; found {found}"
            raise self._error(reason, name)
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = DTYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            reason = f"unsupported dtype {shown(str(kind))}; supported: {', '.join(DTYPES)}"
            raise self._error(reason, name)
        if not isinstance(shape, list) or not all(
            type(dim) is int and 0 <= dim <= MAX_DIMENSION for dim in shape
        ):
            raise self._error(f"shape {shown(str(shape))} is not a list of sizes", name)
        if len(shape) > MAX_RANK:
            raise self._error(f"{len(shape)} dimensions, more than {MAX_RANK}", name)
        pair = isinstance(offsets, list) and [type(offset) for offset in offsets] == [int, int]
        if not pair or not 0 <= offsets[0] <= offsets[1]:
            shown_offsets = shown(str(offsets))
            reason = f"data_offsets {shown_offsets} are not [begin, end] with 0 <= begin <= end"
            raise self._error(reason, name)
        needed, given = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
        if needed != given:
            reason = f"{kind}{shape} needs {needed} bytes, data_offsets give {given}"
            raise self._error(reason, name)
        start, stop = (data_start + offset for offset in offsets)
        return TensorInfo(name, dtype, tuple(shape), start, stop)

    def _check_ranges(self, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
        """The tensors must tile the data exactly: no overlap, hole, missing or trailing bytes."""
        position = data_start
        for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
            if info.start < position:
                raise self._error("its bytes overlap those of another tensor", info.name)
            if info.start > position:
                raise self._error(f"a hole of {info.start - position} bytes before it", info.name)
            position = info.stop
            if position > size:
                reason = f"truncated: ends at byte {position}, the file has {size}"
                raise self._error(reason, info.name, _DOWNLOAD_AGAIN)
        if position != size:
            raise self._error(f"{size - position} trailing bytes after the last tensor")
