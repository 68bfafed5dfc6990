"""Writes safetensors files and model directories, right ones and broken ones."""

import json
import pathlib
import shutil
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

MODELS = pathlib.Path(__file__).parent.parent / "oracles" / "models"

NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint32): "U32",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int64): "I64",
    np.dtype(np.bool_): "BOOL",
}


def header_of(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    header, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


def file_bytes(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    path.write_bytes(file_bytes(*header_of(tensors)))


def model(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """A copy of an oracle model's directory to be damaged; its tensors."""
    folder.mkdir(parents=True)
    shutil.copy(MODELS / name / "config.json", folder)
    shutil.copy(MODELS / name / "model.safetensors", folder)
    return tensors_of(folder / "model.safetensors")


def tensors_of(path: pathlib.Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    result = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        raw = data[8 + length + start : 8 + length + stop]
        result[name] = np.frombuffer(raw, dtypes[entry["dtype"]]).reshape(entry["shape"])
    return result


def shard(folder: pathlib.Path, tensors: dict[str, np.ndarray], shards: int = 2) -> dict[str, str]:
    """Replace model.safetensors by shards and an index; the index's weight_map."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::shards]}
        write(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return weight_map


def write_sharded(folder: pathlib.Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    """Shards by name, and their index."""
    for name, tensors in shards.items():
        write(folder / name, tensors)
    write_index(folder, {key: name for name, tensors in shards.items() for key in tensors})


def write_index(folder: pathlib.Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not ...}))


def change_tensors(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Those of the one file of weights, by `change` of their dict."""
    path = folder / "model.safetensors"
    tensors = {name: np.array(a) for name, a in tensors_of(path).items()}
    change(tensors)
    write(path, tensors)
