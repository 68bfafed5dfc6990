"""`g_idx`: the group of each row, where groups are of rows that lie apart (`desc_act`, `actorder`).

fdq's codes have the rows of a group together, and their order beside them.
"""

import dataclasses
import hashlib

import numpy as np

from fdq_checkpoints.sources.codec import Codec
from fdq_checkpoints.sources.stored_weight import Linear


def in_order_of_groups(codec: Codec, linear: Linear, end: str) -> Linear:
    """The layer with a `row_order` where its rows need one; CheckpointError for uneven groups."""
    order = order_of_rows(codec, linear, end)
    if np.array_equal(order, np.arange(order.size)):
        return linear
    spec = dataclasses.replace(linear.spec, row_order=True)
    digest = hashlib.sha256(order.tobytes()).hexdigest()
    return dataclasses.replace(linear, spec=spec, order=digest)


def order_of_rows(codec: Codec, linear: Linear, end: str) -> np.ndarray:
    """Rows of the weight by group, int32 `[in]`, those of a group in their order."""
    index, k = codec.read_end(linear, end), linear.shape[1]
    size = linear.spec.group_size or k
    groups = k // size
    if index.shape != (k,) or (index < 0).any() or (index >= groups).any():
        raise codec.bad(linear, end, f"no groups of 0 ... {groups - 1} for {k} rows")
    if (np.bincount(index, minlength=groups) != size).any():
        raise codec.bad(linear, end, f"groups that are not all of {size} rows")
    return np.argsort(index, kind="stable").astype(np.int32)
