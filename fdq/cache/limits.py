"""What a cache may ask for, looked at before it is made: positions of the model, memory."""

from __future__ import annotations

import operator
import os
import pathlib
import warnings
from typing import Any

import jax
import jax.export

from fdq.text_table import size

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_MEMINFO = pathlib.Path("/proc/meminfo")


def whole(name: str, value: Any, least: int) -> Any:
    """`value`, a whole number of at least `least` or a symbolic size; ValueError otherwise."""
    if jax.export.is_symbolic_dim(value):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, found {value!r}.")
    return operator.index(value)


def warn_of_positions(what: str, count: int, config: Any) -> None:
    """Warns where a model would be asked about more positions than it was made for."""
    most = getattr(config, "max_position", None)
    if most is not None and count > most:
        warnings.warn(beyond_positions(what, count, most), stacklevel=3)


def beyond_positions(what: str, count: int, most: int) -> str:
    """The words for `count` tokens where a model has `most` positions."""
    return (
        f"{what}: {count:,} tokens are more than the {most:,} positions that the model was made "
        "for (max_position); what it says beyond them is seldom of use."
    )


def refuse_what_does_not_fit(
    slots: int, bytes_a_slot: float, device: Any = None, *, always: float = 0.0
) -> None:
    """Raises ValueError where that many slots take more than the memory of the device has left.

    Args:
      slots: of each sequence.
      bytes_a_slot: of all sequences and layers that have that many.
      device: where the cache will be, None for the default device.
      always: bytes that are taken whatever the slots are: those of rings.
    """
    free = available_bytes(device)
    needed = slots * bytes_a_slot + always
    if free is None or needed <= free:
        return
    fit = int(max(free - always, 0) / bytes_a_slot) if bytes_a_slot else 0
    raise ValueError(
        f"max_length={slots:,}: a cache of so many tokens takes {size(needed)}, but "
        f"{size(free)} of memory are free. {fit:,} tokens would fit: take "
        "fewer (max_new_tokens, max_length), fewer sequences, or a smaller format (cache='C8', "
        "'C4')."
    )


def available_bytes(device: Any = None) -> int | None:
    """Bytes that can still be allocated on a device, the default one for None; None if unknown.

    Of an accelerator what its allocator has left, of the CPU what the machine and the container
    that the process is in have left (caches of files count as free).
    """
    if device is None:
        device = jax.config.jax_default_device or jax.devices()[0]
    if getattr(device, "platform", device) != "cpu":
        return _on_accelerator(device)
    known = [free for free in (_of_machine(), _of_container()) if free is not None]
    return min(known, default=None)


def _on_accelerator(device: Any) -> int | None:
    ask = getattr(device, "memory_stats", None)
    stats = (ask() if ask is not None else None) or {}
    limit = stats.get("bytes_limit")
    return None if not limit else limit - stats.get("bytes_in_use", 0)


def _of_machine() -> int | None:
    """What the kernel could give without swapping; elsewhere than on Linux the physical memory."""
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _of_container() -> int | None:
    """What the limit of the control group leaves (version 2, then 1); None without a limit."""
    for limit, used, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (_CGROUP / limit).read_text().strip()
            held = int((_CGROUP / used).read_text())
            stat = (_CGROUP / limit).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if most == "max":
            return None
        reclaimable = dict(zip(stat[::2], stat[1::2], strict=False)).get(files, 0)
        return max(0, int(most) - held + int(reclaimable))
    return None
