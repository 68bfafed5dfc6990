"""Which implementation and which formulation an op uses: decided while tracing, from measured data.

``implementation`` is what the user may force (``"xla"``, ``"mosaic_gpu"``); a *formulation* is one
of several XLA programs with the same meaning, chosen by path, rows of x and size of the weight
from ``cpu_choices.json``. ``python -m benchmarks.cpu --tune`` measures that table again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable
from importlib import resources
from typing import Any

from pallas_kernels.device import default_device

IMPLEMENTATIONS = ("xla", "mosaic_gpu")
_LOGGER = logging.getLogger("fdq")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
      name: ``xla``, ``mosaic_gpu``, or None for the best.
      source: ``implementation`` (the argument), ``FDQ_IMPLEMENTATION`` or ``default``.
    """

    name: str | None
    source: str


def resolve_implementation(op: str, implementation: str | None) -> Request:
    """What to trace ``op`` as: the argument, else ``FDQ_IMPLEMENTATION``, else the best.

    Raises:
      ValueError: for an unknown name.
    """
    name, source = implementation, "implementation"
    if name is None:
        name, source = os.environ.get("FDQ_IMPLEMENTATION") or None, "FDQ_IMPLEMENTATION"
    if name is None:
        return Request(None, "default")
    if name not in IMPLEMENTATIONS:
        options = ", ".join(repr(n) for n in IMPLEMENTATIONS)
        raise ValueError(f"{op}: unknown {source} {name!r}; use one of {options}, or None.")
    return Request(name, source)


def accept_kernel(
    op: str,
    request: Request,
    obstacle: Callable[[], str | None],
    preference: Callable[[], str | None],
) -> bool:
    """Whether ``op`` is traced as a Mosaic GPU kernel.

    Args:
      op: for messages.
      request: what the user asked for.
      obstacle: why the kernel cannot run this; None if it can. Asked only where kernels are
        considered at all, for asking imports them.
      preference: asked where the user left the choice and the kernel can: why XLA is preferred,
        None if the kernel is.

    Raises:
      NotImplementedError: the argument ``implementation="mosaic_gpu"`` asks for what cannot be.
        ``FDQ_IMPLEMENTATION`` stands for a whole program: there XLA runs what kernels cannot.
    """
    if request.name == "xla":
        _log_once(op, "xla", f"{request.source}='xla'")
        return False
    if request.name is None and trace_target().platform != "gpu":
        _log_once(op, "xla", "the device is not a GPU")
        return False
    reason = obstacle()
    if request.name == "mosaic_gpu":
        if reason is not None and request.source == "implementation":
            raise NotImplementedError(
                f"{op}[mosaic_gpu]: {reason}; use implementation=None or 'xla'."
            )
        origin = f"{request.source}='mosaic_gpu'"
    else:
        reason = reason or preference()
        origin = "the tuning table prefers it"
    if reason is not None:
        _log_once(op, "xla", reason)
        return False
    _log_once(op, "mosaic_gpu", origin)
    return True


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    _LOGGER.info("%s runs as %r: %s", op, name, reason)


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a trace is for.

    Attributes:
      platform: ``cpu``, ``gpu`` or ``tpu``.
      has_bfloat16: False where bfloat16 arithmetic is emulated (GPUs before sm_80, like the T4).
    """

    platform: str
    has_bfloat16: bool


def trace_target() -> Target:
    """The default device's kind; reads no device memory and works while tracing."""
    device = default_device()
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    capability = getattr(device, "compute_capability", None)
    has_bfloat16 = True
    if platform == "gpu" and capability is not None:
        try:
            has_bfloat16 = float(capability) >= 8.0
        except ValueError:  # ROCm says "gfx90a"
            has_bfloat16 = True
    return Target(platform, has_bfloat16)


@dataclasses.dataclass(frozen=True)
class Formulation:
    """One XLA program for a product of ``x [M, K]`` with a weight.

    Attributes:
      name: ``fused`` (one element-wise fusion over blocks of packed rows and a small dot, M times),
        ``tiles`` (decode ``size`` columns, dot, next), ``whole`` (decode everything, one dot).
      size: packed units a block (``fused``) or columns a tile (``tiles``).
    """

    name: str
    size: int = 0


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = resources.files("fdq.ops").joinpath("cpu_choices.json").read_text("utf-8")
    return json.loads(text)["choices"]


_OVERRIDES: list[Formulation] = []


class forced_formulation:
    """Context manager that forces a formulation for everything traced inside (benchmarks, tests).

    Functions already compiled are not traced again: use fresh ``jax.jit`` objects inside.
    """

    def __init__(self, name: str, size: int = 0):
        self.formulation = Formulation(name, size)

    def __enter__(self) -> Formulation:
        _OVERRIDES.append(self.formulation)
        return self.formulation

    def __exit__(self, *exception: object) -> None:
        _OVERRIDES.pop()


def choose_formulation(path: str, rows: int, elements: int) -> Formulation:
    """The measured choice on CPU: the first row of the table whose bounds hold.

    Args:
      path: a key of ``cpu_choices.json``: a weight format, or ``"default"`` for the rest.
      rows: rows M of x.
      elements: K * N.
    """
    if _OVERRIDES:
        return _OVERRIDES[-1]
    table = _table()
    for row in table.get(path, table["default"]):
        if rows <= row.get("max_rows", rows) and elements <= row.get("max_elements", elements):
            return Formulation(row["formulation"], row.get("size", 0))
    raise ValueError(f"cpu_choices.json: no row for {path!r}, {rows} rows, {elements} elements.")
