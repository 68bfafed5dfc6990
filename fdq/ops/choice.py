"""Which XLA program computes a product: decided while tracing, from measured data.

Several programs have the same meaning; on CPUs one is chosen by format, rows of x and size of the
weight from a table of `cpu_choices/`, one a class of CPUs. `python -m benchmarks.cpu --tune`
measures the table of the machine's class again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Hashable, Iterator
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


def compute_capability() -> float:
    """Of the NVIDIA GPU that a trace is for; 0 of every other device."""
    try:
        return float(getattr(default_device(), "compute_capability", None) or 0)
    except ValueError:  # ROCm's
        return 0.0


def traced_for() -> Hashable:
    """All that choices here depend on besides shapes: a static argument of what is traced once."""
    return trace_target(), cpu_class(), tuple(_OVERRIDES)


CPU_CLASSES = ("amx", "avx512", "avx2")
"""By what makes the difference: tiles of int8, 8-bit dots of 64 bytes, neither."""


@functools.cache
def cpu_class() -> str:
    """This machine's class of `CPU_CLASSES`; `avx2` where the system does not say."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text("utf-8").split()
    except OSError:  # not Linux
        return "avx2"
    if "amx_int8" in flags:
        return "amx"
    return "avx512" if "avx512_vnni" in flags else "avx2"


@dataclasses.dataclass(frozen=True)
class Program:
    """How `x [M, K]` is multiplied with a weight, or a cache is read.

    Attributes:
      name: `fused` (M fusions over blocks of packed units), `lookup` (the same with a table of what
        each byte contributes), `split` (float rows as int8 ones, blocks of K), `tiles` (of
        columns), `blocks` (of K), `table` (the same, bytes decoded by a table) or `whole`.
        For attention `decoded`, `parts` (float rows as a few of int8 or bfloat16) or `lanes`
        (element-wise fusions that leave sums for each lane, for few rows).
      size: packed units of a block (`fused`, `lookup`), columns (`tiles`), slots (attention), or
        rows of K.
    """

    name: str
    size: int = 0


@functools.cache
def _table(name: str) -> dict[str, list[dict[str, Any]]]:
    text = resources.files("fdq.ops").joinpath(f"cpu_choices/{name}.json").read_text("utf-8")
    return json.loads(text)["choices"]


_OVERRIDES: list[Program] = []
_OF_ATTENTION = ("decoded", "parts", "lanes")


@contextlib.contextmanager
def forced_program(name: str, size: int = 0) -> Iterator[Program]:
    """Forces a program for what is traced inside: fresh `jax.jit` objects (benchmarks, tests)."""
    _OVERRIDES.append(Program(name, size))
    try:
        yield _OVERRIDES[-1]
    finally:
        _OVERRIDES.pop()


def choose_program(path: str, rows: int, elements: int, default: str = "default") -> Program:
    """The first row of the table under `path` (or `default`) whose bounds hold.

    `rows` are those of x, M; `elements` those of the weight, K * N. For attention they are the
    queries of a KV head and the slots.
    """
    forced = [p for p in _OVERRIDES if (p.name in _OF_ATTENTION) == (default == "attention")]
    if forced:
        return forced[-1]
    name = cpu_class()
    table = _table(name)
    for row in table.get(path, table[default]):
        if rows <= row.get("max_rows", rows) and elements <= row.get("max_elements", elements):
            return Program(row["program"], row.get("size", 0))
    raise ValueError(
        f"cpu_choices/{name}.json: no row for {path!r}, {rows} rows, {elements} elements."
    )
