"""The tables of the trellis codes: trained once, shipped, and what a version of them means.

A format's name ends in the version of its table, so a checkpoint says by which it was made. Tables
of a version never change; better ones would be another version, beside these. They are made by
`fdq.formats.trellis_training`.
"""

from __future__ import annotations

import functools
import pathlib

import numpy as np

VERSION = 1
WINDOW = 12  # bits that a value is looked up by
_FILE = pathlib.Path(__file__).with_name(f"trellis_tables_v{VERSION}.npz")


@functools.cache
def words(bits: float) -> np.ndarray:
    """uint32 `[4096]`: the bfloat16 values of a step, the first in the lower half."""
    with np.load(_FILE, allow_pickle=False) as stored:
        halves = stored[f"{bits:g}"].astype(np.uint32)  # [4096, values]
    return halves[:, 0] if halves.shape[1] == 1 else halves[:, 0] | halves[:, 1] << np.uint32(16)


@functools.cache
def table(bits: float) -> np.ndarray:
    """float32 `[4096, values]`."""
    with np.load(_FILE, allow_pickle=False) as stored:
        return (stored[f"{bits:g}"].astype(np.uint32) << np.uint32(16)).view(np.float32)
