"""Kernels prove themselves on the user's device once, on a small case, before they are used.

One that does not compile there, or disagrees with its reference, is switched off with one line in
the log, and XLA goes on in its place. One that writes where it must not can end the process, or
leave a device that answers nothing any more: `fdq kernels --check` runs the checks in processes of
their own, and what it found is read here.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from fdq.ops import verdicts

_LOGGER = logging.getLogger("fdq")
_LOCK = threading.Lock()
_RESULTS: dict[tuple[Any, ...], str | None] = {}

DURATION = "/fdq/self_check"
"""What `jax.monitoring` calls the seconds that a check took."""

THREAD = "fdq-self-check"
"""How the names of the threads that check begin."""

TOLERANCE = 1e-4
"""Largest difference over the largest reference value. Kernels sum in float32 (5e-6); a wrong one
is off by far more."""


def is_real(device: Any) -> bool:
    """Whether a device can run programs: not one of a topology to compile ahead of time for."""
    try:
        return any(device is one for one in jax.devices(device.platform))
    except RuntimeError:  # this machine has no such platform
        return False


@dataclasses.dataclass(frozen=True)
class Check:
    """That a kernel is right for one format of weights or of a cache.

    Attributes:
      kernel: its name in the tuning table.
      detail: the format, and what else the kernel is compiled for.
      case: returns the kernel's results and the reference's; a function of a module, or a
        `functools.partial` of one. It is traced once, into one program.
      tolerance: of results, as a part of the largest reference value.
    """

    kernel: str
    detail: str
    case: Callable[[], tuple[Any, Any]]
    tolerance: float = TOLERANCE

    @property
    def name(self) -> str:
        """For people, and for what is remembered."""
        return f"{self.kernel}[{self.detail}]"

    def failure(self, device: Any) -> str | None:
        """Why the kernel is switched off on `device`; None if it is right there, or cannot be run.

        It runs once in a process, and not at all where `fdq kernels --check` has found an answer
        for this device; in a thread of its own, for this one may be tracing.
        """
        if not is_real(device):
            return None
        key = (self.kernel, self.detail, device.device_kind)
        with _LOCK:
            if key not in _RESULTS:
                known = verdicts.load(verdicts.environment_of(device))
                reason = known[self.name] if self.name in known else self._timed(device)
                if reason is not None:
                    message = (
                        "%s[%s] is switched off on %s: %s; another implementation takes its "
                        "place (fdq kernels --check looks again)"
                    )
                    _LOGGER.warning(message, *key, reason)
                _RESULTS[key] = reason
            return _RESULTS[key]

    def run(self, device: Any) -> str | None:
        """What is wrong with the kernel on `device`, found out here and now; None if nothing is."""
        return _compare(device, self.case, self.tolerance)

    def _timed(self, device: Any) -> str | None:
        start = time.perf_counter()
        with ThreadPoolExecutor(1, thread_name_prefix=THREAD) as pool:
            reason = pool.submit(self.run, device).result()
        jax.monitoring.record_event_duration_secs(DURATION, time.perf_counter() - start)
        return reason


def failure(
    kernel: str,
    format: str,
    device: Any,
    case: Callable[[], tuple[Any, Any]],
    *,
    tolerance: float = TOLERANCE,
) -> str | None:
    """`Check.failure` of a check of these fields."""
    return Check(kernel, format, case, tolerance).failure(device)


def _compare(device: Any, case: Callable[[], Any], tolerance: float) -> str | None:
    try:
        with jax.default_device(device):
            results, references = jax.jit(case)()
            pairs = zip(jax.tree.leaves(results), jax.tree.leaves(references), strict=True)
            for result, reference in pairs:
                got = np.asarray(result).astype(np.float64)
                wanted = np.asarray(reference).astype(np.float64)
                largest = np.abs(wanted).max()
                difference = np.abs(got - wanted).max()
                if not difference <= tolerance * largest or largest == 0:
                    return (
                        f"it differs from its reference by {difference:.3g} where the largest "
                        f"value is {largest:.3g}"
                    )
    except Exception as error:  # whatever the compiler or the driver raises
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return None
