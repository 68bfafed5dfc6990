"""Work on the parts of large tensors: on all cores, a bounded number of bytes ahead, in order."""

import collections
import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

SLAB_WEIGHTS = 1 << 22
"""Weights of a slab: enough to keep a core busy, few enough that a dozen are a small memory."""
SLAB_COLUMNS = 128
"""A slab's columns are a multiple of it: no block of a format lies in two slabs."""
_MOST_WORKERS = 16
AHEAD_BYTES = 32 * 2**20
"""Of what is worked on or waits to be taken, for each core."""


@dataclasses.dataclass(frozen=True)
class Task:
    """`work()` holds about `nbytes`."""

    work: Callable[[], Any]
    nbytes: int


def columns(k: int, n: int) -> list[tuple[int, int]]:
    """Ranges of the columns of a `[k, n]` weight, of equal width where that can be."""
    units = -(-n // SLAB_COLUMNS)
    most = max(1, SLAB_WEIGHTS // (SLAB_COLUMNS * max(1, k)))
    # Each width is compiled for: a divisor that is nearly as large makes one of them.
    fits = [width for width in range(most, most // 2, -1) if n % (width * SLAB_COLUMNS) == 0]
    width = (fits[0] if fits else math.ceil(units / math.ceil(units / most))) * SLAB_COLUMNS
    return [(start, min(start + width, n)) for start in range(0, n, width)]


def in_order(tasks: Iterable[Task], *, workers: int | None = None) -> Iterator[Any]:
    """What the tasks give, in their order; some are worked on while the first is waited for.

    An error of a task is raised in its turn; those begun are waited for, the others dropped.
    """
    workers = workers or _cores()
    device = jax.config.jax_default_device  # which other threads do not see

    def run(task: Task) -> Any:
        with jax.default_device(device):
            return task.work()

    waiting: collections.deque[tuple[Any, int]] = collections.deque()
    ahead = 0
    with concurrent.futures.ThreadPoolExecutor(workers, "fdq") as pool:
        try:
            for task in tasks:
                while waiting and (
                    ahead + task.nbytes > workers * AHEAD_BYTES or len(waiting) > 4 * workers
                ):
                    ahead -= waiting[0][1]
                    yield waiting.popleft()[0].result()  # and nobody here holds it any more
                waiting.append((pool.submit(run, task), task.nbytes))
                ahead += task.nbytes
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    return min(os.cpu_count() or 1, _MOST_WORKERS)
