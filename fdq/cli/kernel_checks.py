"""`fdq kernels --check`: every kernel against its reference, in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import typer

from fdq.cli import console
from fdq.ops import verdicts

STARTING = 300.0
"""Seconds that a process has to say what there is: jax, and a driver that wakes up."""

_DYING = 30.0  # seconds
_WORKER = (sys.executable, "-m", "fdq.cli.check_worker")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one check; `reason` is why its kernel is left alone, None if it is right."""

    name: str
    kernel: str
    reason: str | None
    seconds: float | None


def run(kernel: str | None, *, interpret: bool, timeout: float, as_json: bool) -> None:
    """Runs the checks, remembers and prints what came out; exits with 1 if a kernel failed.

    Raises:
      ValueError: no GPU, or no kernel of that name.
    """
    with _Worker(interpret) as worker:
        hello = worker.start()
        if not interpret and hello["platform"] not in ("gpu", "cuda"):
            raise ValueError(
                f"--check: kernels run on NVIDIA GPUs, and JAX found none here (its device is "
                f"{hello['environment']['device']!r}). fdq kernels --check --interpret runs them "
                "in an interpreter, which takes minutes; add --kernel append for one."
            )
        chosen = {n: k for n, k in hello["checks"].items() if (kernel or "").lower() in n.lower()}
        if not chosen:
            known = ", ".join(dict.fromkeys(hello["checks"].values()))
            raise ValueError(f"--kernel {kernel!r} matches no check. There are: {known}.")
        outcomes: list[Outcome] = []
        with console.progress("Checking") as progress:
            for name, kind in chosen.items():
                progress(len(outcomes), len(chosen), name)
                reason, seconds = worker.check(name, timeout)
                outcomes.append(Outcome(name, kind, reason, seconds))
                # At once: what has been found is not lost with what comes after it.
                found = {} if _is_short_of_memory(reason) else {name: reason}
                file = verdicts.save(hello["environment"], found)
    failed = [one for one in outcomes if one.reason is not None]
    if as_json:
        checks = [dataclasses.asdict(one) | {"ok": one.reason is None} for one in outcomes]
        where = None if file is None else str(file)
        console.print_json({**hello["environment"], "checks": checks, "remembered_in": where})
    else:
        _show(hello["environment"], outcomes, failed, file)
    if failed:
        raise typer.Exit(console.FAILED_CHECK)


def _is_short_of_memory(reason: str | None) -> bool:
    """Whether a check failed for want of memory, which says nothing about the kernel."""
    return any(s in (reason or "") for s in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"))


def _show(environment: dict[str, str], outcomes: Any, failed: list[Outcome], file: Any) -> None:
    rows = []
    for kernel in dict.fromkeys(one.kernel for one in outcomes):
        of_kernel = [one for one in outcomes if one.kernel == kernel]
        wrong = sum(one.reason is not None for one in of_kernel)
        seconds = sum(one.seconds or 0.0 for one in of_kernel)
        rows.append((kernel, str(len(of_kernel) - wrong), str(wrong), f"{seconds:.0f}"))
    title = f"{environment['device']}, jax {environment['jax']}"
    console.out.print(console.table(title, ["kernel", "right", "wrong", "seconds"], rows))
    for one in failed:
        console.out.print(f"{one.name}: {one.reason}", markup=False, soft_wrap=True)
    if file is None:
        said = "Nothing is remembered: there is no directory for it (FDQ_CACHE_DIR)."
    else:
        said = "Remembered for this device and these versions: models start without these checks"
        said += ", and XLA takes the place of what failed." if failed else "."
    console.out.print(said, markup=False, soft_wrap=True)


class _Worker:
    """A process that checks, started again after whatever may have spoiled it."""

    def __init__(self, interpret: bool) -> None:
        self._environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if interpret:
            self._environment["JAX_PLATFORMS"] = "cpu"
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._said = ""  # the last line of standard error

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        self._end()

    def start(self) -> dict[str, Any]:
        """Starts a process, and returns what it says there is; ends the command if it cannot."""
        self._process = process = subprocess.Popen(
            _WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # it ends with all that it has started
        )
        self._lines, self._said = queue.Queue(), ""
        readers = (process.stdout, self._lines.put), (process.stderr, self._note)
        self._threads = [threading.Thread(target=_read, args=one, daemon=True) for one in readers]
        for thread in self._threads:
            thread.start()
        found = self._answer(STARTING)
        if isinstance(found, str):
            problem = f"--check: the process that checks kernels could not start: {found}"
            console.fail(problem, console.FAILED_CHECK)
        return found

    def check(self, name: str, timeout: float) -> tuple[str | None, float | None]:
        """Why a check failed, None if it did not, and the seconds that it took."""
        if self._process is None:
            self.start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says so
            self._process.stdin.write(json.dumps(name) + "\n")
            self._process.stdin.flush()
        found = self._answer(timeout)
        if isinstance(found, str):
            return found, None
        if found["reason"] is not None:
            self._end()  # after some errors a device answers nothing any more
        return found["reason"], found["seconds"]

    def _answer(self, timeout: float) -> dict[str, Any] | str:
        """What the process says, or how it failed to; then it is no more."""
        assert self._process is not None
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self._end()
            return f"it took longer than {timeout:g} seconds"
        if line.endswith("\n"):  # not half of one, of a process that ended as it wrote
            return json.loads(line)
        status = self._process.wait()
        self._end()  # all that it said has been read then
        ended = f"status {status}" if status >= 0 else signal.Signals(-status).name
        last = [self._said.strip()] if self._said.strip() else []
        return ": ".join([f"the process ended with {ended}", *(text[:200] for text in last)])

    def _note(self, line: str) -> None:
        self._said = line or self._said

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
            process.wait(timeout=_DYING)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        for thread in self._threads:
            thread.join(timeout=_DYING)


def _read(stream: Any, take: Callable[[str], None]) -> None:
    """Hands on lines, and "" at the end."""
    with stream:
        for line in stream:
            take(line)
    take("")
