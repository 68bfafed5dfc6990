"""The file of a `Calibration`: an uncompressed zip of `.npy` members (so `numpy.load` reads it).

The member `calibration.json` says what the file is and lists its arrays. Reading is strict: sizes
are compared before anything is allocated, and nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

HEADER = "calibration.json"
FORMAT = "fdq-calibration"
VERSION = 1
MAX_HEADER_BYTES = 16_000_000


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], tokens: int, sample: str = ""
) -> None:
    """Writes float32 arrays by name; the file is there as a whole or not at all."""
    target = pathlib.Path(path)
    temporary = target.with_name(target.name + ".tmp")
    header = {"format": FORMAT, "version": VERSION, "tokens": tokens, "sample": sample}
    header["arrays"] = list(arrays)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(HEADER, json.dumps(header))
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, np.asarray(array, np.float32), allow_pickle=False)
                archive.writestr(f"{name}.npy", buffer.getvalue())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], int, str]:
    """The arrays by name, the number of tokens and their hash; errors as of `Calibration.load`."""
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            for name, info in members.items():
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                    raise ValueError(
                        f"{path}: {name!r} is compressed; fdq writes these files plain."
                    )
            header = _header(path, archive, members)
            wanted = {f"{name}.npy": name for name in header["arrays"]}
            for name in sorted(wanted.keys() ^ (members.keys() - {HEADER})):
                state = "missing" if name in wanted else "not listed in its header"
                raise ValueError(f"{path}: {name!r} is {state}.")
            arrays = {
                name: _array(f"{path}: {member}", archive.read(member))
                for member, name in wanted.items()
            }
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: not a calibration, or damaged ({error}). Calibration.save writes one."
        ) from error
    return arrays, header["tokens"], header.get("sample", "")


def _header(path: Any, archive: zipfile.ZipFile, members: Mapping[str, Any]) -> dict[str, Any]:
    if HEADER not in members or members[HEADER].file_size > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: no {HEADER}, so not what Calibration.save writes.")
    try:
        header = json.loads(archive.read(HEADER))
    except ValueError as error:
        raise ValueError(f"{path}: {HEADER} is not valid JSON: {error}.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path}: {HEADER} does not say format {FORMAT!r}.")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {header.get('version')!r} of the file; this fdq reads {VERSION}. "
            "Upgrade fdq, or calibrate again."
        )
    tokens, names = header.get("tokens"), header.get("arrays")
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"{path}: tokens = {tokens!r}, expected a positive whole number.")
    if not re.fullmatch("([0-9a-f]{64})?", str(header.get("sample", ""))):
        raise ValueError(f"{path}: sample = {header['sample']!r:.80}, expected a SHA-256.")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: the names of its arrays are no list of strings.")
    return header


def _array(where: str, data: bytes) -> np.ndarray:
    """A float32 array in `.npy` form, whose header must agree with its size."""
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise ValueError(f"{where}: no array in NumPy's format ({error}).") from error
    rest = data[file.tell() :]
    if dtype != np.float32 or fortran:
        raise ValueError(f"{where}: {dtype} (Fortran order: {fortran}), expected float32 rows.")
    if len(rest) != 4 * math.prod(shape):
        raise ValueError(f"{where}: {len(rest)} bytes, expected {4 * math.prod(shape)} of {shape}.")
    array = np.frombuffer(rest, dtype).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: NaN or infinity. Calibrate again.")
    return array
