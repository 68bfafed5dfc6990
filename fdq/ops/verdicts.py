"""What `fdq kernels --check` has found out about the kernels on this machine's device.

A file of the user's cache directory holds the answers for one environment: kind of device, driver,
versions of jax, and the kernels' sources. Another environment has none, and so has a file that
cannot be read: then kernels are checked as if nobody ever had.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jax
import jaxlib.version

from fdq.user_cache import user_cache

MOST_BYTES = 1 << 20
"""A larger file is none of ours."""

_DRIVER = pathlib.Path("/proc/driver/nvidia/version")


def load(environment: dict[str, str]) -> dict[str, str | None]:
    """Why a kernel is wrong, None if it is right, by name of a check.

    Empty where nothing is known, or nothing can be read.
    """
    path = _path(environment)
    if path is None:
        return {}
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or found.get("environment") != environment:
        return {}
    reasons = found.get("checks")
    if not isinstance(reasons, dict):
        return {}
    return {n: r for n, r in reasons.items() if r is None or (isinstance(r, str) and r)}


def save(environment: dict[str, str], reasons: Mapping[str, str | None]) -> pathlib.Path | None:
    """Adds answers to those that are there; the file, or None where there is no place for it.

    Whoever reads meanwhile finds the old file or the new one, whole.
    """
    path = _path(environment)
    if path is None:
        return None
    checks = dict(sorted((load(environment) | dict(reasons)).items()))
    text = json.dumps({"environment": environment, "checks": checks}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(prefix=path.stem, suffix=".new", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(new, path)
        except BaseException:
            pathlib.Path(new).unlink(missing_ok=True)
            raise
    except OSError:
        return None
    return path


def environment_of(device: Any) -> dict[str, str]:
    """All that an answer depends on."""
    client = getattr(device, "client", None)
    return {
        "device": device.device_kind,
        "driver": f"{getattr(client, 'platform_version', '')} {_driver()}".strip(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "kernels": _sources(),
    }


def _path(environment: dict[str, str]) -> pathlib.Path | None:
    cache = user_cache()
    if cache is None:
        return None
    key = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "kernels" / f"{key}.json"


def _driver() -> str:
    try:
        return _DRIVER.read_text("utf-8", errors="replace").partition("\n")[0].strip()
    except OSError:
        return ""


@functools.cache
def _sources() -> str:
    """Stands for the kernels, their tuning tables, and how their checks are made."""
    digest = hashlib.sha256()

    def add(folder: Any, prefix: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            name = f"{prefix}/{entry.name}"
            if entry.is_dir():
                if entry.name not in ("aot", "reports", "__pycache__"):
                    add(entry, name)
            elif entry.name.endswith((".py", ".json")):
                data = entry.read_bytes()
                digest.update(f"{name} {len(data)}\n".encode() + data)

    add(resources.files("pallas_kernels"), "pallas_kernels")
    for name in ("ops", "cache", "formats", "quantizers"):
        add(resources.files(f"fdq.{name}"), f"fdq/{name}")
    return digest.hexdigest()[:16]
