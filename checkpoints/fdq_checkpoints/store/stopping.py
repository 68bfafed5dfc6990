"""Signals that stop a job: INT, TERM and HUP end it alike, and wait while something is written."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_LOGGER = logging.getLogger("fdq")
_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal that would have killed the process; `number` says which."""

    def __init__(self, message: str = "", *, number: int = signal.SIGINT):
        super().__init__(*filter(None, (message,)))
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """TERM and HUP raise `Stopped`, where they would kill: who handles or ignores them goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number=number)

    found = [one for one in _TO_STOP[1:] if signal.getsignal(one) is signal.SIG_DFL]
    for number in found:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in found:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Holds them back until the end: a batch is written and in the journal, or neither."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: handler
        for number in _TO_STOP
        if callable(handler := signal.getsignal(number))  # what is ignored or kills does so
    }

    def wait(number: int, _: FrameType | None) -> None:
        if not came:
            _LOGGER.warning("Stopping when what is being written is on disk ...")
        came.append(number)

    for number in before:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)
