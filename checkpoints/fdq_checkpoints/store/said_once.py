"""Errors that are raised are not printed as well by the threads and loops they came through."""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """What is raised here is not printed as well, by each thread that it went through."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def nothing(record: logging.LogRecord) -> bool:
        del record
        return False

    for logger in loggers:
        logger.addFilter(nothing)
    try:
        yield
    except BaseException:
        _drop_late_callbacks()
        gc.collect()  # tasks that failed unseen say so when they go
        raise
    finally:
        for logger in loggers:
            logger.removeFilter(nothing)


def _drop_late_callbacks() -> None:
    """When one of several writes or reads fails, Orbax closes its event loop under the others.

    Each of those prints a traceback, at any time later (Orbax 0.12.8).
    """
    before = sys.unraisablehook
    if getattr(before, "drops_late_callbacks", False):
        return

    def hook(raised: Any) -> None:
        is_late = isinstance(raised.exc_value, RuntimeError)
        if not (is_late and str(raised.exc_value) == "Event loop is closed"):
            before(raised)

    hook.drops_late_callbacks = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook
