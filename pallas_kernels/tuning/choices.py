"""Which kernel is worth using where, and how it is cut: read from `tuning/*.json`.

A file holds what `python -m benchmarks.tune` measured on one kind of device, `defaults.json`
what every other device gets. The first row that fits decides::

    {"kernel": "matrix_vector", "formats": ["int4"], "max_rows": 1, "max_weights": 16777216,
     "use": "mosaic_gpu", "config": {"split": 8}}

`kernel` and the names in `formats` may be `"*"`; a bound that is absent always holds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from importlib import resources
from typing import Any

_PRODUCTS = ("matrix_vector", "integer_matrix_vector", "gathered_matrix_vector")
_TENSOR_CORES = ("mma_matmul", "integer_mma", "gathered_mma", "gathered_integer_mma")
_OTHERS = ("decode_weight", "float8_blocks", "decode_attention", "append", "router")
KERNELS = (*_PRODUCTS, *_TENSOR_CORES, *_OTHERS)
"""Names that rows may use; of attention and append the format is that of the cache. A kernel
of the tensor cores that is not used for 8 rows or fewer leaves them to the others, not to XLA.
"""

USES = ("mosaic_gpu", "xla")
_CUT = ("block_columns", "split", "step_rows", "prefetch")
CONFIG = (
    dict.fromkeys(_PRODUCTS, _CUT)
    | dict.fromkeys(_TENSOR_CORES, _CUT[:2])
    | {"decode_attention": ("parts",)}
)
"""Settings that a row may have, by kernel."""

_BOUNDS = ("max_rows", "min_weights", "max_weights")
_FIELDS = {"kernel", "formats", *_BOUNDS, "use", "config"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to run."""

    use: str  # of USES
    config: dict[str, int]  # by name; settings that are absent are the kernel's own choice
    source: str  # where this comes from, for the log


def file_name(device_kind: str) -> str:
    """Name of the file of a device kind: `NVIDIA L4` -> `nvidia_l4.json`."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def check(table: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a tuning table; or ValueError, naming the row and field that are wrong."""
    rows = table.get("choices") if isinstance(table, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{name}: expected an object with a list 'choices'")
    for i, row in enumerate(rows):
        if problem := _problem(row):
            raise ValueError(f"{name}: choices[{i}]{problem}")
    return rows


def _problem(row: Any) -> str | None:
    """What is wrong with a row, to be read after its name; None if nothing is."""
    if not isinstance(row, dict):
        return f" is {row!r}, expected an object"
    if unknown := sorted(set(row) - _FIELDS):
        return f" has unknown fields {unknown}"
    if row.get("kernel") not in (*KERNELS, "*"):
        return f".kernel is {row.get('kernel')!r}, expected one of {KERNELS}"
    if row.get("use") not in USES:
        return f".use is {row.get('use')!r}, expected {USES}"
    if not isinstance(row.get("formats"), list):
        return ".formats is not a list of format names"
    known, config = CONFIG.get(row["kernel"], ()), row.get("config", {})
    numbers = {field: row[field] for field in _BOUNDS if field in row} | config
    wrong = sorted(set(config) - set(known))
    wrong += [field for field, value in numbers.items() if not isinstance(value, int)]
    if wrong:
        only = f"in config for {row['kernel']!r} only {known}"
        return f": expected whole numbers, and {only}; found {', '.join(wrong)}"
    return None


@functools.cache
def _rows(file: str) -> list[dict[str, Any]]:
    path = resources.files("pallas_kernels.tuning").joinpath(file)
    return check(json.loads(path.read_text("utf-8")), file) if path.is_file() else []


def choose(device_kind: str, kernel: str, format: str, *, rows: int, weights: int) -> Choice:
    """The measured choice for a device (its kind as `jax.Device` says it), else the default.

    `format` is of the weight, or of the cache (its dtype for floats); `rows` M, of attention
    sequences; `weights` K * N, of attention numbers in the cache of keys (B * KH * S * D), of
    append the columns of qkv, of the router experts.
    """
    for file in (file_name(device_kind), "defaults.json"):
        for i, row in enumerate(_rows(file)):
            if (
                row["kernel"] in (kernel, "*")
                and not {format, "*"}.isdisjoint(row["formats"])
                and rows <= row.get("max_rows", rows)
                and row.get("min_weights", 0) <= weights <= row.get("max_weights", weights)
            ):
                return Choice(row["use"], dict(row.get("config", {})), f"tuning/{file}, row {i}")
    return Choice("xla", {}, "no row of tuning/defaults.json fits")


def settings(device_kind: str, kernel: str, format: str, *, rows: int) -> list[dict[str, int]]:
    """Every `config` that `choose` may give for weights of some size, each once."""
    found: list[dict[str, int]] = []
    for file in (file_name(device_kind), "defaults.json"):
        for row in _rows(file):
            fits = row["kernel"] in (kernel, "*") and not {format, "*"}.isdisjoint(row["formats"])
            if not fits or rows > row.get("max_rows", rows):
                continue
            if row["use"] == "mosaic_gpu" and row.get("config", {}) not in found:
                found.append(dict(row.get("config", {})))
            if not {"min_weights", "max_weights"} & set(row):
                return found
    return found
