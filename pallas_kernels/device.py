"""Facts that are asked for before any kernel is imported: Mosaic takes a third of a second."""

from __future__ import annotations

from typing import Any

import jax

MOST_ROWS = 8
"""Rows of x that the matrix-vector kernels take; beyond, tensor cores are the better tool."""

MOST_MMA_ROWS = 64
"""Rows of x that the tensor cores' kernel takes: their sums are in registers."""


def default_device() -> Any:
    """The device that a trace is for; of a topology where one is compiled for ahead of time."""
    device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device
