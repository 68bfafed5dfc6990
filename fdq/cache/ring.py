"""Caches of layers with a sliding window: rings, in which new tokens replace those out of sight.

Position p of a sequence lies in slot `p % slots`. A ring has more slots than its window sees, so
that a sequence may be rolled back, and tokens fed again, while all that is seen is still there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.core import Tracer

SPARE = 256
"""Tokens that may be rolled back in a ring, where nobody says how many."""

_MULTIPLE = 16  # of slots: programs of CPUs read as many at a time


def ring_slots(window: int | None, spare: int, max_length: Any) -> int | None:
    """Slots of a ring of that window; None where all `max_length` tokens are kept.

    Twice `spare` beyond the window: as many tokens may be rolled back, and then as many fed again
    that were known before.
    """
    if window is None or not isinstance(max_length, int):
        return None
    slots = -(-(window + 2 * spare) // _MULTIPLE) * _MULTIPLE
    return slots if slots < max_length else None


def spare_of(layers: Any) -> int | None:
    """How many tokens may be rolled back, or fed again: what the rings of all layers allow.

    None without a ring.
    """
    rings = (layer.k for layer in layers if layer.k.window is not None)
    return min(((ring.codes.shape[-2] - ring.window) // 2 for ring in rings), default=None)


def check_rollback(length: Any, reach: Any, spare: int) -> None:
    """ValueError where a ring no longer has what `length` tokens see, as far as values are known.

    `reach [B]` is how many tokens each sequence had when it was longest.
    """
    if isinstance(length, Tracer) or isinstance(reach, Tracer):
        return
    wanted, most = np.asarray(length), np.asarray(reach)
    if (wanted < most - spare).any():
        raise ValueError(
            f"rollback to {wanted.tolist()} tokens: layers with a sliding window have lost what it "
            f"would see; they go back by {spare} tokens from the longest that a sequence was, "
            f"{most.tolist()}. Make the cache with a larger `spare`, or read the prompt again."
        )
