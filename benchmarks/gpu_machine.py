"""What the GPU is and what it can do: copy and read bandwidth, matrix rate."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.gpu_child import Emit, Settings, section_main
from benchmarks.gpu_timing import reason, slope
from benchmarks.gpu_weights import random_array

_PACKAGES = (
    "fdq",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "torch",
    "triton",
    "gemlite",
    "tokamax",
)


def run(settings: Settings, emit: Emit) -> None:
    """Reports ``{"machine": {...}}``: device, versions, bandwidth (bytes/s), rate (flop/s)."""
    device = jax.devices()[0]
    if device.platform != "gpu" and not settings.smoke:
        emit({"machine": describe(device)})
        return
    limit = (device.memory_stats() or {}).get("bytes_limit", 4 << 30)
    machine = {**describe(device), "memory_bytes": limit, "versions": versions()}
    size = 1 << 16 if settings.smoke else min(1 << 30, limit // 8)
    dtype = jnp.dtype(settings.dtype)
    for name, measure in {
        "copy_bandwidth": lambda: copy_bandwidth(size),
        "read_bandwidth": lambda: read_bandwidth(size),
        "matrix_rate": lambda: matrix_rate(_matrix_size(device, settings), dtype),
    }.items():
        try:
            machine[name] = measure()
        except Exception as error:
            machine[name] = None
            machine[f"{name}_error"] = reason(error)
    machine["matrix_dtype"] = settings.dtype
    emit({"machine": machine})


def describe(device: Any) -> dict[str, Any]:
    """Name and properties of a device, as JSON."""
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "compute_capability": getattr(device, "compute_capability", None),
        "multiprocessors": getattr(device, "core_count", None),
        "driver": _driver(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Of everything that has a part in the figures and is installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str | None:
    """Driver, clocks and power limit as nvidia-smi says them; None without it."""
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else None


def copy_bandwidth(size: int) -> float:
    """Bytes read and written a second by a kernel that changes ``size`` random bytes."""
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)

    @functools.partial(jax.jit, static_argnums=1)
    def change(x: jax.Array, turns: int) -> jax.Array:
        return lax.fori_loop(0, turns, lambda i, x: x ^ (i + 1).astype(jnp.uint32), x)

    return 2 * size / slope(lambda turns: change(x, turns), 8)


def read_bandwidth(size: int) -> float:
    """Bytes a second of a sum over ``size`` random bytes."""
    x = jax.random.bits(jax.random.key(1), (size // 4,), jnp.uint32)

    @functools.partial(jax.jit, static_argnums=1)
    def read(x: jax.Array, turns: int) -> jax.Array:
        def body(i, total):
            return total + jnp.sum(x ^ (i.astype(jnp.uint32) + total), dtype=jnp.uint32)

        return lax.fori_loop(0, turns, body, jnp.uint32(0))

    return size / slope(lambda turns: read(x, turns), 8)


def matrix_rate(size: int, dtype: Any) -> float:
    """Floating point operations a second of a ``size`` x ``size`` product in ``dtype``."""
    keys = jax.random.split(jax.random.key(2), 2)
    x = random_array(keys[0], (size, size), dtype)
    w = random_array(keys[1], (size, size), dtype, size**-0.5)

    @functools.partial(jax.jit, static_argnums=2)
    def multiply(x: jax.Array, w: jax.Array, turns: int) -> jax.Array:
        return lax.fori_loop(0, turns, lambda _, x: x @ w, x)

    return 2 * size**3 / slope(lambda turns: multiply(x, w, turns), 4)


def _matrix_size(device: Any, settings: Settings) -> int:
    if settings.smoke:
        return 64
    cores = getattr(device, "core_count", None) or 0
    return 8192 if cores >= 100 else 4096


if __name__ == "__main__":
    section_main(run)
