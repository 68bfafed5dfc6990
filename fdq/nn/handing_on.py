"""How modules hand rows on that are not finished yet (`fdq.ops.rows`).

fdq's own modules read such rows. A module that a user put in place of one (an adapter around a
projection, another norm) is called with arrays, and its result is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fdq.ops.rows import Rows, Sums, as_array


def takes_rows[F: Callable[..., Any]](call: F) -> F:
    """Marks a `__call__` that reads unfinished rows; one that overrides it is not marked."""
    call.takes_rows = True  # type: ignore[attr-defined]
    return call


def reads_rows(module: Any) -> bool:
    """Whether a module reads unfinished rows."""
    return getattr(type(module).__call__, "takes_rows", False)


def hand_on(module: Any, rows: Rows, *arguments: Any, **settings: Any) -> Any:
    """`module(rows, ...)`, with the rows as an array where it is not one of fdq's."""
    return module(rows if reads_rows(module) else as_array(rows), *arguments, **settings)


def sums_of(module: Any, rows: Rows) -> Sums:
    """`module(rows)` of a `Linear`, its sum left to whoever reads it; see `hand_on`."""
    fused = reads_rows(module)
    return module(rows, summed=False) if fused else Sums.of(module(as_array(rows)))
