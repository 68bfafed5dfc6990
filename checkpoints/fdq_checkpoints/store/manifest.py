"""`fdq.json`: what the arrays of an fdq checkpoint mean, and the checksums they must have.

The static part of every quantized tensor (its spec) is here, not in Orbax, which would drop it.
Each array's dtype, shape and CRC-32 are here too, because Orbax neither refuses to cast nor
notices a flipped bit. The file carries the SHA-256 of its own content.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import QTensor
from fdq.quantizers import quantize_array
from fdq.schemes.fold import Fold
from fdq.schemes.scheme import ActivationSpec, WeightSpec
from fdq_checkpoints.errors import CheckpointError, shown
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.file_names import is_template
from fdq_checkpoints.tree_paths import Path, dotted

FILE_NAME = "fdq.json"
WEIGHTS = "weights"
FORMAT = "fdq-checkpoint"
FORMAT_VERSION = 1
MAX_BYTES = 256_000_000
MAX_RANK = 32
_READ_BYTES = 2**20
MAX_SIZE = 2**60  # NumPy refuses larger arrays, those without elements too

KINDS = ("model", "params")
_TYPES: dict[str, Any] = {
    "files": dict,
    "data": dict,
    "provenance": dict,
    "fdq_version": str,
    "scheme": str | None,
    "config": dict | None,
}


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """One stored array: dtype name, shape, CRC-32 of its little-endian bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file under `weights/`: its bytes, and their CRC-32 (None in the first checkpoints)."""

    bytes: int
    crc32: int | None = None


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of the tree, with its arrays by field name of `QTensor` or under `"value"`.

    `shape` is that of what it stands for, `(..., K, N)` for a quantized weight; `activation` is how
    the module that holds the weight quantizes its input; `prng` names the PRNG implementation if
    the array is the data of a key; `fold` is that of a `FoldedWeight`, whose shape is its kernel's.
    """

    path: Path
    shape: tuple[int, ...]
    arrays: dict[str, ArrayEntry]
    spec: WeightSpec | None = None
    padding: int = 0
    activation: ActivationSpec | None = None
    prng: str | None = None
    fold: Fold | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes, packed, scales included."""
        return sum(array.nbytes for array in self.arrays.values())

    def abstract(self) -> Any:
        """The tensor with `jax.ShapeDtypeStruct` for arrays: a quantized weight, or one array."""
        arrays: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype))
            for name, array in self.arrays.items()
        }
        if self.spec is None:
            return arrays["value"]
        q = QTensor(**arrays, spec=self.spec, padding=self.padding)
        if self.fold is None:
            return q
        return FoldedWeight(q, self.fold, self.shape[len(self.shape) - len(self.fold.order) :])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `fdq.json`, in its order.

    `kind` is `"model"` (`config`, as of `DecoderConfig.to_dict`, builds it) or `"params"` (any
    tree). `scheme` is a name for people; the truth is in the tensors' specs. `files` are those
    copied beside the weights: `name -> {"bytes": …, "sha256": …}`. `data` are the files under
    `weights/`, Orbax's own too; `write` fills it in. `tensors` are in the tree's order.
    """

    fdq_version: str = "unknown"
    kind: str
    scheme: str | None = None
    config: dict[str, Any] | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    data: dict[str, FileEntry] = dataclasses.field(default_factory=dict)
    tensors: tuple[TensorEntry, ...]


_FIELDS = frozenset(field.name for field in dataclasses.fields(Manifest))


def checksum(array: np.ndarray) -> int:
    """CRC-32 of the array's bytes in C order (1.4 GB/s; SHA-256 would be half as fast)."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write(manifest: Manifest, folder: pathlib.Path) -> None:
    """Write `fdq.json` beside the finished `weights/`, whose files it lists."""
    weights = folder / WEIGHTS
    paths = [path for path in sorted(weights.rglob("*")) if path.is_file()]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        data = {
            path.relative_to(weights).as_posix(): dataclasses.asdict(entry)
            for path, entry in zip(paths, threads.map(_file_entry, paths), strict=True)
        }
    tensors = [tensor_to_json(tensor) for tensor in manifest.tensors]
    content: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    content |= vars(manifest) | {"data": data, "tensors": tensors}
    content["sha256"] = _digest(content)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def _file_entry(path: pathlib.Path) -> FileEntry:
    return FileEntry(path.stat().st_size, file_checksum(path))


def file_checksum(path: pathlib.Path) -> int:
    """CRC-32 of a file."""
    found, buffer = 0, bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(memoryview(buffer)[:count], found)
    return found


def read(folder: pathlib.Path) -> Manifest:
    """Read `fdq.json`; CheckpointError for all that can be wrong with it without the arrays."""
    path = folder / FILE_NAME
    if not path.exists():
        raise CheckpointError(f"{folder}: no {FILE_NAME}; not a (complete) fdq checkpoint.")
    content = strict_json.read_object(path, max_bytes=MAX_BYTES)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {content.get('format')!r}, expected {FORMAT!r}.")
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format_version {version!r} is not a version.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format version {version} is newer than {FORMAT_VERSION}, the "
            f"newest that this fdq reads (written by fdq {content.get('fdq_version')}). "
            "Upgrade fdq."
        )
    digest = content.pop("sha256", None)
    if digest != _digest(content):
        raise CheckpointError(
            f"{path}: its content does not match its own sha256; it was edited or damaged. "
            "Copy or convert the checkpoint again."
        )
    if unknown := sorted(content.keys() - _FIELDS - {"format", "format_version"}):
        raise CheckpointError(f"{path}: unknown keys {unknown}.")
    try:
        return _from_json(content, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: malformed ({type(error).__name__}: {error}).") from error


def tensor_to_json(tensor: TensorEntry) -> dict[str, Any]:
    """One entry of `tensors`; fields that say nothing are left out."""
    entry: dict[str, Any] = {
        "path": list(tensor.path),
        "shape": list(tensor.shape),
        "arrays": {name: dataclasses.asdict(array) for name, array in tensor.arrays.items()},
    }
    if tensor.spec is not None:
        entry["spec"] = dataclasses.asdict(tensor.spec)
        if not tensor.spec.row_order:  # what older fdq does not know is there only if it counts
            del entry["spec"]["row_order"]
        entry["padding"] = tensor.padding
    if tensor.activation is not None:
        entry["activation"] = dataclasses.asdict(tensor.activation)
    if tensor.fold is not None:
        entry["fold"] = dataclasses.asdict(tensor.fold)
    if tensor.prng is not None:
        entry["prng"] = tensor.prng
    return entry


_ENTRY_KEYS = frozenset(field.name for field in dataclasses.fields(TensorEntry))


def tensor_from_json(entry: dict[str, Any], where: str) -> TensorEntry:
    """The inverse of `tensor_to_json`; CheckpointError where the entry contradicts itself."""
    path = tuple(entry["path"])
    if not path or not all(isinstance(key, str) for key in path):
        raise CheckpointError(f"{where}: {shown(str(path))} is not a path.")
    where = f"{where}: {dotted(path)}"
    if unknown := sorted(entry.keys() - _ENTRY_KEYS):
        raise CheckpointError(f"{where}: unknown keys {unknown}.")
    arrays = {}
    for name, array in entry["arrays"].items():
        dtype, shape = _dtype(array["dtype"], where), _shape(array["shape"], where)
        arrays[name] = ArrayEntry(dtype, shape, _integer(array["crc32"], where))
    spec = activation = None
    if "spec" in entry:
        spec = _spec_from_json(WeightSpec, entry["spec"], where)
    if "activation" in entry:
        activation = _spec_from_json(ActivationSpec, entry["activation"], where)
    shape, padding = _shape(entry["shape"], where), _integer(entry.get("padding", 0), where)
    prng, fold = entry.get("prng"), None
    if "fold" in entry:
        fold = _fold_from_json(entry["fold"], shape, where)
    tensor = TensorEntry(path, shape, arrays, spec, padding, activation, prng, fold)
    _check_arrays(tensor, where)
    return tensor


def _check_arrays(tensor: TensorEntry, where: str) -> None:
    """The arrays must be exactly those that quantizing such a shape by this spec gives."""
    if tensor.spec is None:
        if tensor.fold is not None:
            raise CheckpointError(f"{where}: folded, but not quantized.")
        if set(tensor.arrays) != {"value"}:
            raise CheckpointError(f"{where}: a plain tensor has arrays {sorted(tensor.arrays)}.")
        shape = tensor.arrays["value"].shape if tensor.prng is None else _keys_shape(tensor, where)
        if tensor.shape != shape:
            raise CheckpointError(f"{where}: shape {tensor.shape}, but its array says {shape}.")
        return
    if tensor.prng is not None:
        raise CheckpointError(f"{where}: both quantized and a PRNG key.")
    try:
        matrix = tensor.shape if tensor.fold is None else tensor.fold.shape(tensor.shape)
        expected = _abstract(matrix, tensor.spec)
    except ValueError as error:
        raise CheckpointError(f"{where}: impossible spec ({error})") from error
    found = {name: (a.dtype, a.shape) for name, a in tensor.arrays.items()}
    wanted = {
        name: (np.dtype(a.dtype).name, tuple(a.shape)) for name, a in expected.arrays().items()
    }
    if found != wanted or tensor.padding != expected.padding:
        raise CheckpointError(
            f"{where}: {tensor.spec.format} of shape {tensor.shape} has arrays {wanted} and "
            f"padding {expected.padding}, found {found} and padding {tensor.padding}."
        )


def _keys_shape(tensor: TensorEntry, where: str) -> tuple[int, ...]:
    if not isinstance(tensor.prng, str):
        raise CheckpointError(f"{where}: prng {shown(str(tensor.prng))} is not a name.")
    wrap = functools.partial(jax.random.wrap_key_data, impl=tensor.prng)
    try:
        return jax.eval_shape(wrap, tensor.abstract()).shape
    except (ValueError, TypeError) as error:
        reason = str(error).split(" for impl=")[0]  # a page of functions
        raise CheckpointError(f"{where}: not the data of a PRNG key ({reason}).") from error


@functools.lru_cache(maxsize=256)
def _abstract(shape: tuple[int, ...], spec: WeightSpec) -> QTensor:
    return quantize_array(jax.ShapeDtypeStruct(shape, jnp.float32), spec)


def _from_json(content: dict[str, Any], path: pathlib.Path) -> Manifest:
    if content["kind"] not in KINDS:
        raise CheckpointError(f"{path}: kind {content['kind']!r} is not one of {KINDS}.")
    if content["kind"] == "model" and not isinstance(content["config"], dict):
        raise CheckpointError(f"{path}: a model without its config.")
    tensors = tuple(tensor_from_json(entry, str(path)) for entry in content["tensors"])
    if len({tensor.path for tensor in tensors}) != len(tensors):
        raise CheckpointError(f"{path}: two tensors have the same path.")
    for key, expected in _TYPES.items():
        if not isinstance(content[key], expected):
            raise CheckpointError(f"{path}: {key} is a {type(content[key]).__name__}.")
    for name, file in content["files"].items():
        if not isinstance(file, dict) or not isinstance(file.get("sha256"), str):
            raise CheckpointError(f"{path}: no hash of {shown(name)}.")
        plain = pathlib.PurePath(name).name == name and name not in ("", ".", "..", FILE_NAME)
        if not plain and not is_template(name):
            raise CheckpointError(f"{path}: {shown(name)} is not a file name.")
    data = {}
    for name, file in content["data"].items():
        if ".." in pathlib.PurePosixPath(name).parts or name.startswith("/"):
            raise CheckpointError(f"{path}: {shown(name)} is not a path under {WEIGHTS}/.")
        where = f"{path}: {shown(name)}"
        if isinstance(file, dict) and file.keys() == {"bytes", "crc32"}:
            data[name] = FileEntry(_integer(file["bytes"], where), _integer(file["crc32"], where))
        else:
            data[name] = FileEntry(_integer(file, where))
    fields: dict[str, Any] = {name: content[name] for name in _FIELDS}
    fields |= {"tensors": tensors, "data": data}
    return Manifest(**fields)


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _spec_from_json(kind: Any, values: dict[str, Any], where: str) -> Any:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for flag in ("double_quantization", "dynamic", "row_order"):
        if not isinstance(fields.get(flag, False), bool):
            raise CheckpointError(f"{where}: {flag} is {fields[flag]!r}, expected true or false.")
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: impossible {kind.__name__} ({error}).") from error


def _fold_from_json(fold: Any, shape: tuple[int, ...], where: str) -> Fold:
    order, contracted = fold["order"], _integer(fold["contracted"], where)
    axes = sorted(_integer(axis, where) for axis in order)
    whole = axes == list(range(len(axes))) and len(axes) <= len(shape)
    if not (whole and 0 < contracted < len(axes)):
        raise CheckpointError(f"{where}: {shown(str(fold))} is no fold of shape {shape}.")
    return Fold(tuple(order), contracted)


def _integer(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{where}: {shown(str(value))} is not a whole number.")
    return value


def _dtype(name: Any, where: str) -> str:
    try:
        return np.dtype(jnp.dtype(name)).name
    except TypeError:
        raise CheckpointError(f"{where}: unknown dtype {shown(str(name))}.") from None


def _shape(shape: Any, where: str) -> tuple[int, ...]:
    if (
        not isinstance(shape, list)
        or not all(type(dim) is int and dim >= 0 for dim in shape)
        or len(shape) > MAX_RANK
        or math.prod(dim for dim in shape if dim) > MAX_SIZE
    ):
        raise CheckpointError(f"{where}: {shown(str(shape))} is not a shape.")
    return tuple(shape)
