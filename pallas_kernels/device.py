"""Facts that are asked for before any kernel is imported: Mosaic takes a third of a second."""

from __future__ import annotations

from typing import Any

import jax

MOST_ROWS = 8
"""Rows of x that the matrix-vector kernels take; beyond, tensor cores are the better tool."""

MOST_MMA_ROWS = 64
"""Rows of x that the tensor cores' kernel takes: their sums are in registers."""


def default_device() -> Any:
    """The device that a trace is for; of a topology where one is compiled for ahead of time.

    In `jax.shard_map` over devices of another kind than the default one it is one of those.
    """
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    held = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if held is None or held.device_kind == device.device_kind:
        return device
    alike = (
        d for d in jax.local_devices(backend=held.platform) if d.device_kind == held.device_kind
    )
    return next(alike, device)
