"""The arguments of `route`, as its implementations take them."""

from __future__ import annotations

import dataclasses

import jax

from fdq.ops.rows import Rows


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """See `fdq.ops.route.api.route`."""

    x: Rows
    kernel: jax.Array
    correction_bias: jax.Array | None
    top_k: int
    normalize: bool
    norm_min: float
