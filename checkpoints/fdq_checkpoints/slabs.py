"""Work on the parts of large tensors: on all cores, a bounded number of bytes ahead, in order."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

SLAB_WEIGHTS = 1 << 21
"""Weights of a slab: what is made of one on the way to codes stays in a core's cache."""
SLAB_COLUMNS = 128
"""A slab's columns are a multiple of it: no block of a format lies in two slabs."""
_MOST_WORKERS = 16
WORKING_BYTES = 32 * 2**20
"""Of what is worked on, for each core; what is larger is worked on alone."""
WAITING_BYTES = 16 * 2**20
"""Of what is done and waits to be taken, for each core."""
TICK_SECONDS = 1.0
_QUEUED = 8  # tasks for each core: whoever takes what is done may be busy for a while


@dataclasses.dataclass(frozen=True)
class Task:
    """`work()` holds about `nbytes`, and what it gives about `result_bytes`."""

    work: Callable[[], Any]
    nbytes: int
    result_bytes: int


def columns(k: int, n: int) -> list[tuple[int, int]]:
    """Ranges of the columns of a `[k, n]` weight.

    All are of one width, for all weights of `k` rows, as each width is compiled for: where the last
    one would be narrower, it starts earlier.
    """
    if not n:
        return []
    width = SLAB_COLUMNS * max(1, SLAB_WEIGHTS // (SLAB_COLUMNS * max(1, k)))
    starts = range(0, n, width)
    last = n - width if n > width and n % SLAB_COLUMNS == 0 else starts[-1]
    return [(start, start + width) for start in starts[:-1]] + [(last, n)]


def in_order(
    tasks: Iterable[Task],
    *,
    workers: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Any]:
    """What the tasks give, in their order; some are worked on while the first is waited for.

    `tick` is called before each and every second of the waiting, by whoever waits.

    An error of a task is raised in its turn; those begun are waited for, the others dropped.
    """
    workers = workers or _cores()
    device = jax.config.jax_default_device  # which other threads do not see
    room = _Room(workers * WORKING_BYTES)

    def run(task: Task) -> Any:
        with room.for_bytes(task.nbytes), jax.default_device(device):
            return task.work()

    waiting: collections.deque[tuple[Any, int]] = collections.deque()
    ahead = 0
    with concurrent.futures.ThreadPoolExecutor(workers, "fdq") as pool:
        try:
            for task in tasks:
                while waiting and (
                    ahead + task.result_bytes > workers * WAITING_BYTES
                    or len(waiting) >= _QUEUED * workers
                ):
                    ahead -= waiting[0][1]
                    yield _result(waiting.popleft()[0], tick)  # and nobody here holds it any more
                waiting.append((pool.submit(run, task), task.result_bytes))
                ahead += task.result_bytes
            while waiting:
                yield _result(waiting.popleft()[0], tick)
        finally:
            for future, _ in waiting:
                future.cancel()


def _result(future: concurrent.futures.Future[Any], tick: Callable[[], None]) -> Any:
    while True:
        tick()
        concurrent.futures.wait((future,), TICK_SECONDS)
        if future.done():
            return future.result()


class _Room:
    """A number of bytes that threads share."""

    def __init__(self, nbytes: int):
        self._free, self._all = nbytes, nbytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def for_bytes(self, nbytes: int) -> Iterator[None]:
        """Waits until there is room, for more than there is in all until nobody else is there."""
        taken = min(nbytes, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= taken)
            self._free -= taken
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    return min(os.cpu_count() or 1, _MOST_WORKERS)
