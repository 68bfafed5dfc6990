"""Which XLA program computes a product: decided while tracing, from measured data.

Several programs have the same meaning; on CPUs one is chosen by format, rows of x and size of the
weight from `cpu_choices.json`. `python -m benchmarks.cpu --tune` measures that table again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from pallas_kernels.device import default_device


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a trace is for."""

    platform: str  # cpu, gpu or tpu
    has_bfloat16: bool  # False where it is emulated (GPUs before sm_80, like the T4)


def trace_target() -> Target:
    """The default device's kind; reads no device memory and works while tracing."""
    device = default_device()
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    capability = getattr(device, "compute_capability", None)
    try:
        return Target(platform, platform != "gpu" or capability is None or float(capability) >= 8.0)
    except ValueError:  # ROCm says "gfx90a"
        return Target(platform, True)


@dataclasses.dataclass(frozen=True)
class Program:
    """How `x [M, K]` is multiplied with a weight: as `fused`, `tiles` or `whole`.

    That is M fusions over blocks of `size` packed units, tiles of `size` columns, or one dot.
    """

    name: str
    size: int = 0


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = resources.files("fdq.ops").joinpath("cpu_choices.json").read_text("utf-8")
    return json.loads(text)["choices"]


_OVERRIDES: list[Program] = []


@contextlib.contextmanager
def forced_program(name: str, size: int = 0) -> Iterator[Program]:
    """Forces a program for what is traced inside: fresh `jax.jit` objects (benchmarks, tests)."""
    _OVERRIDES.append(Program(name, size))
    try:
        yield _OVERRIDES[-1]
    finally:
        _OVERRIDES.pop()


def choose_program(path: str, rows: int, elements: int) -> Program:
    """The first row of `cpu_choices.json` under `path` (or `default`) whose bounds hold.

    `rows` are those of x, M; `elements` those of the weight, K * N.
    """
    if _OVERRIDES:
        return _OVERRIDES[-1]
    table = _table()
    for row in table.get(path, table["default"]):
        if rows <= row.get("max_rows", rows) and elements <= row.get("max_elements", elements):
            return Program(row["program"], row.get("size", 0))
    raise ValueError(f"cpu_choices.json: no row for {path!r}, {rows} rows, {elements} elements.")
