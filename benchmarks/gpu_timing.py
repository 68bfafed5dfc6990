"""Times one launch inside a program: slopes over unrolled chains that rotate their operands.

A launch of microseconds cannot be timed from Python, so a compiled program makes many of them. A
program of n launches and one of 2n are timed in turn; half of what is spent on the difference of
their launches is the time of one, and whatever a call costs by itself drops out. Each launch reads
another operand, together more than four times the L2 cache, so that every byte comes from memory.
Launches are tied to each other by optimization barriers: none is moved, merged or left out.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

L2_TURNS = 4
MOST_LINKS = 256
_SECONDS = 0.2  # of timed calls a program
_REPETITIONS = (9, 51)
_WARM_UPS = 3  # command buffers are recorded, and updated once, in the first calls


@dataclasses.dataclass(frozen=True)
class Work:
    """One launch, to be timed.

    Attributes:
      step: ``(x, operand) -> y``; with ``threads`` it returns ``(y, operand)``.
      x: what every launch gets, unchanged.
      operands: what the launches read in turn, alike in structure and shapes.
      threads: the launch updates its operand in place; operands are donated.
      compiler_options: of XLA, for this work alone.
      calls: what the compiled program must call, by its name in it.
    """

    step: Callable[..., Any]
    x: Any
    operands: list[Any]
    threads: bool = False
    compiler_options: dict[str, Any] | None = None
    calls: str | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a launch takes.

    Attributes:
      seconds: median of the slopes.
      spread: half the distance between their quartiles, as a part of the median.
      links: launches of the shorter program.
      compile_seconds: of both programs.
    """

    seconds: float
    spread: float
    links: int
    compile_seconds: float


class Noisy(str):
    """Why there is no time although the work runs: it took now this and now that."""


def links_for(operand_bytes: int, l2_bytes: int, *, smoke: bool = False) -> int:
    """How many operands exceed the L2 cache four times; at least 3, at most 256."""
    if smoke:
        return 1
    return min(MOST_LINKS, max(3, math.ceil(L2_TURNS * l2_bytes / operand_bytes)))


def l2_ratio(operand_bytes: float, l2_bytes: int) -> float:
    """Bytes of all operands by those of the L2 cache: below 4, some may be read from it."""
    return round(operand_bytes / l2_bytes, 2)


def _program(work: Work, links: int) -> Callable[..., Any]:
    step = jax.jit(work.step)  # traced and lowered once, not for each launch: that takes a second

    def run(x: Any, operands: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs, operands = [], list(operands)
        for i in range(links):
            at = i % len(operands)
            if work.threads:
                y, operands[at] = step(x, operands[at])
            else:
                y = step(x, operands[at])
            x, y = lax.optimization_barrier((x, y))
            # Every result is returned: one that nobody uses would not be computed.
            outputs.append(y)
        return outputs, operands if work.threads else []

    return jax.jit(run, donate_argnums=(1,) if work.threads else ())


def time_all(works: dict[str, Work], *, smoke: bool = False) -> dict[str, Timing | str]:
    """Times several kinds of work side by side, call by call in turn.

    Args:
      works: by name.
      smoke: one repetition: nothing about the time, only that it runs.

    Returns:
      A Timing each, or why there is none: `Noisy` if only the time is not known.
    """
    result: dict[str, Timing | str] = {}
    programs: dict[str, tuple[Any, Any]] = {}
    seconds: dict[str, float] = {}
    with ThreadPoolExecutor(4) as pool:
        pending = {}
        for name, work in works.items():
            start = time.perf_counter()
            links = len(work.operands)
            try:
                counts = (links,) if smoke else (links, 2 * links)
                lowered = [_program(work, n).lower(work.x, work.operands) for n in counts]
            except Exception as error:
                result[name] = reason(error)
                continue
            pending[name] = [pool.submit(_compile, one, work) for one in lowered]
            seconds[name] = time.perf_counter() - start
        for name, futures in pending.items():
            try:
                compiled = [future.result() for future in futures]
                programs[name] = (compiled[0][0], compiled[-1][0])
                seconds[name] += sum(spent for _, spent in compiled)
            except Exception as error:
                result[name] = reason(error)
    runs = {}
    for name, (short, long) in programs.items():
        try:
            run = _Run(works[name], short, long)
            for _ in range(0 if smoke else _WARM_UPS - 1):
                run.once()
            runs[name] = run
        except Exception as error:
            result[name] = reason(error)
    slopes: dict[str, list[float]] = {name: [] for name in runs}
    repetitions = 1 if smoke else _repetitions(max((r.last for r in runs.values()), default=1.0))
    for _ in range(repetitions):
        for name, run in runs.items():
            short, long = run.once()
            slopes[name].append((long - short) / len(works[name].operands))
    for name, values in slopes.items():
        result[name] = _timing(values, len(works[name].operands), seconds[name], smoke)
    del runs, programs
    gc.collect()
    return {name: result[name] for name in works}


def _compile(lowered: Any, work: Work) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=work.compiler_options)
    spent = time.perf_counter() - start
    if work.calls is not None and work.calls not in compiled.as_text():
        raise ValueError(f"XLA compiled it without a call of {work.calls}")
    return compiled, spent


def _repetitions(seconds: float) -> int:
    low, high = _REPETITIONS
    return int(min(high, max(low, _SECONDS / max(seconds, 1e-9))))


def _timing(slopes: list[float], links: int, compiled: float, smoke: bool) -> Timing | str:
    low, median, high = (float(v) for v in np.percentile(slopes, (25, 50, 75)))
    if smoke:  # nothing is slower than nothing: the interpreter's times count for nobody
        return Timing(max(median, 1e-9), 0.0, links, compiled)
    if median <= 0 or high - low > median:
        return Noisy(f"too noisy to time: slopes between {low * 1e6:.2f} and {high * 1e6:.2f} us")
    return Timing(median, (high - low) / 2 / median, links, compiled)


class _Run:
    """The two programs of one kind of work, with the operands that they hand on."""

    def __init__(self, work: Work, short: Any, long: Any):
        self.work, self.short, self.long = work, short, long
        self.operands = list(work.operands)
        if work.threads:  # donated: the caller's stay alive
            self.operands = jax.tree.map(jnp.copy, self.operands)
        self.last = 0.0
        self.once()

    def once(self) -> tuple[float, float]:
        """Seconds of one call of each."""
        short, long = self._call(self.short), self._call(self.long)
        self.last = max(short, long)
        return short, long

    def _call(self, program: Any) -> float:
        start = time.perf_counter()
        outputs, operands = jax.block_until_ready(program(self.work.x, self.operands))
        spent = time.perf_counter() - start
        if self.work.threads:
            self.operands = operands
        # Freed before the next call, which then gets the same addresses: a recorded command
        # buffer is replayed as it is.
        del outputs
        return spent


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or "no message"
    text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else text[:297] + "..."


def difference(result: Any, reference: Any) -> float:
    """Largest difference over the largest reference value.

    Raises:
      ValueError: the reference is zero everywhere, or something is not finite.
    """
    got, wanted = (np.asarray(jax.device_get(a)).astype(np.float64) for a in (result, reference))
    largest = float(np.abs(wanted).max())
    worst = float(np.abs(got - wanted).max())
    if not np.isfinite(largest) or largest == 0 or not np.isfinite(worst):
        raise ValueError(f"nothing to compare: reference up to {largest}, difference {worst}")
    return worst / largest


def slope(run: Callable[[int], Any], turns: int, repetitions: int = 7) -> float:
    """Seconds a turn of ``run(turns)``, whose argument is static: from n and 2n turns.

    Raises:
      ValueError: more turns take no more time.
    """
    for count in (turns, 2 * turns):
        for _ in range(_WARM_UPS):
            jax.block_until_ready(run(count))
    found = []
    for _ in range(repetitions):
        spent = []
        for count in (turns, 2 * turns):
            start = time.perf_counter()
            jax.block_until_ready(run(count))
            spent.append(time.perf_counter() - start)
        found.append((spent[1] - spent[0]) / turns)
    seconds = float(np.median(found))
    if seconds <= 0:
        raise ValueError(f"too noisy to time: {turns} turns more take {seconds * turns:.3g} s")
    return seconds
