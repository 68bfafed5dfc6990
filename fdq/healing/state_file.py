"""Where a run of `heal` is: an uncompressed `.npz` of arrays by number, and a header in JSON.

It is written as a whole or not at all, and read without unpickling anything; sizes are compared
with what is expected before an array is read.
"""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

VERSION = 1
_HEADER = "header"
_MOST_HEADER = 100_000_000
_DAMAGES = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError)
_NPY_HEADER = 1024  # bytes before the data of an array, at most


def write(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Sequence[Any]) -> None:
    """Replaces the file at `path`."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    text = json.dumps({"fdq-healing": VERSION, **header}).encode()
    members: dict[str, Any] = {f"{i:06}": np.asarray(array) for i, array in enumerate(arrays)}
    members[_HEADER] = np.frombuffer(text, np.uint8)
    try:
        with temporary.open("wb") as file:
            np.savez(file, **members)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str], like: Sequence[Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The header and the arrays, which have the shapes and dtypes of `like`.

    Raises:
      ValueError: no such file, a damaged one, or one of a run with other settings.
    """
    names = [f"{i:06}" for i in range(len(like))]
    limits = {f"{n}.npy": a.nbytes + _NPY_HEADER for n, a in zip(names, like, strict=True)}
    limits[f"{_HEADER}.npy"] = _MOST_HEADER
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
        large = [name for name, size in sizes.items() if size > limits.get(name, 0)]
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(bytes(file[_HEADER])) if not large else {}
            if not isinstance(header, dict):
                raise ValueError(f"a header of type {type(header).__name__}")
            if not large and header.get("settings") == dict(settings):
                arrays = [file[name] for name in names]
                if all(_alike(a, b) for a, b in zip(arrays, like, strict=True)):
                    return header, arrays
    except _DAMAGES as error:
        raise damaged(path, error) from error
    theirs = header.get("settings")
    theirs = theirs if isinstance(theirs, dict) else {}
    differ = sorted(key for key in settings if theirs.get(key) != settings[key])
    what = ", ".join(f"{key}={theirs.get(key)} there, {settings[key]} here" for key in differ)
    raise ValueError(
        f"{path}: the state of another run of fdq.heal ({what or 'other sizes'}). Give the same "
        "arguments to go on with it, or delete it to begin again."
    )


def damaged(path: str | os.PathLike[str], why: BaseException) -> ValueError:
    """What is said of a file that is no state, or no longer."""
    return ValueError(
        f"{path}: no state of fdq.heal, or damaged ({why}). Delete it to begin again."
    )


def _alike(a: np.ndarray, b: Any) -> bool:
    return a.shape == tuple(b.shape) and a.dtype == b.dtype
