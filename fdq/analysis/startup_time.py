"""Where the seconds before the first token go: tracing and lowering, compiling, self-checks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

import jax

from fdq.ops.self_check import DURATION as _SELF_CHECK
from fdq.ops.self_check import THREAD as _SELF_CHECK_THREAD

# JAX's names of what it reports.
_LOWERING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)
_COMPILING = ("/jax/core/compile/backend_compile_duration",)


class StartupTime:
    """Seconds that JAX and the self-checks have taken since `measured` began.

    What several threads do at once, or a trace inside of another, counts once.
    """

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[float, float]]] = {}

    @property
    def lowering(self) -> float:
        """Seconds of tracing functions and of lowering them to StableHLO."""
        return _length(span for name in _LOWERING for span in self._spans.get(name, ()))

    @property
    def compiling(self) -> float:
        """Seconds in XLA's compilers, or of reading what they made from the compilation cache."""
        return _length(span for name in _COMPILING for span in self._spans.get(name, ()))

    @property
    def self_check(self) -> float:
        """Seconds of kernels' self-checks, with their own lowering and compiling."""
        return _length(self._spans.get(_SELF_CHECK, ()))

    def _record(self, event: str, duration_secs: float, **_: str | int) -> None:
        if threading.current_thread().name.startswith(_SELF_CHECK_THREAD):
            return
        end = time.perf_counter()
        self._spans.setdefault(event, []).append((end - duration_secs, end))


@contextlib.contextmanager
def measured() -> Iterator[StartupTime]:
    """Listens to what JAX reports of its compilers while the context lasts."""
    spent = StartupTime()
    jax.monitoring.register_event_duration_secs_listener(spent._record)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(spent._record)


def _length(spans: Iterable[tuple[float, float]]) -> float:
    """Of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
