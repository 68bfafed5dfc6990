"""Memory of the host that is free but still counts as the process's own."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

TRIM_BYTES = 4 * 2**20


class Trimmer:
    """Gives freed memory back to the operating system, once in so many bytes of work.

    glibc keeps what is freed below what is not: where large temporaries and small results take
    turns, that is several times what is in use.
    """

    def __init__(self) -> None:
        self._bytes = 0

    def worked(self, nbytes: int) -> None:
        """Arrays of so many bytes have come and gone."""
        self._bytes += nbytes
        if self._bytes >= TRIM_BYTES and (trim := _malloc_trim()) is not None:
            trim(0)
            self._bytes = 0


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    """`malloc_trim` of glibc; None with another C library, or another system."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
