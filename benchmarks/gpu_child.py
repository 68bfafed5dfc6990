"""Sections of the GPU benchmark as processes of their own, which report one JSON line a result.

A process that dies (a compiler that aborts, memory that runs out) takes no other section with it:
what it has reported stays, and it is started again without the case that killed it. Processes also
keep frameworks apart: torch and JAX each find the memory of the GPU free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.gpu_timing import reason

Emit = Callable[[dict[str, Any]], None]

_MARK = "@fdq "
_GRACE = 45.0  # seconds beyond its time until a section is ended
_PROCESSES = 4  # for one section
_NO_TIME = "no time left (--budget-minutes)"
_ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a section is told.

    Attributes:
      smoke: tiny shapes on CPU; nothing that is measured counts.
      seconds: no case is begun after so many.
      dtype: of activations: ``bfloat16``, or ``float16`` where that is not native.
      l2_bytes: of the device.
      case_seconds: a case that takes longer hangs: its process is ended and goes on without it.
      skip: keys of cases that killed the process before.
      more: of this section alone.
    """

    smoke: bool
    seconds: float
    dtype: str = "bfloat16"
    l2_bytes: int = 64 << 20
    case_seconds: float = 100.0
    skip: tuple[str, ...] = ()
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> Settings:
        """From a file with `json.dumps` of `dataclasses.asdict`."""
        fields = json.loads(pathlib.Path(path).read_text("utf-8"))
        return cls(**{**fields, "skip": tuple(fields["skip"])})


def run_cases(
    cases: Iterable[Any],
    settings: Settings,
    emit: Emit,
    measure: Callable[[Any, Settings], dict[str, Any]],
) -> None:
    """Measures cases one after the other until the time is used up; reports each.

    Args:
      cases: with a ``key``.
      settings: of the section.
      emit: where reports go: ``{"case": key, ...}`` with what ``measure`` returned, an ``error``,
        or ``skipped``; before them ``{"cases": keys}`` and each ``{"start": key}``.
      measure: of one case.
    """
    end = time.monotonic() + settings.seconds
    cases = list(cases)
    emit({"cases": [case.key for case in cases]})
    for case in cases:
        if case.key in settings.skip:
            continue
        if time.monotonic() > end:
            emit({"case": case.key, "skipped": _NO_TIME})
            continue
        emit({"start": case.key})
        if not settings.smoke:
            faulthandler.dump_traceback_later(settings.case_seconds, exit=True)
        try:
            emit({"case": case.key, **measure(case, settings)})
        except Exception as error:
            emit({"case": case.key, "error": reason(error)})
        finally:
            faulthandler.cancel_dump_traceback_later()
        gc.collect()  # what one case held on the device is free for the next


def start_section(
    module: str,
    settings: Settings,
    emit: Emit,
    env: dict[str, str],
    tool: tuple[str, ...] = (),
) -> str | None:
    """Runs a section to its end, again without the case that it died of.

    It is not started again where no cases or no time are left.

    Args:
      module: dotted name; its `main` is called by ``python -m``.
      settings: of the section.
      emit: called with each report on a case.
      env: added to the environment; an empty value removes the variable.
      tool: a command that runs the process, as ``compute-sanitizer`` with its options does.

    Returns:
      Why the section did not come to its end; None if it did.
    """
    end = time.monotonic() + settings.seconds
    cases: list[str] = []
    seen: set[str] = set(settings.skip)
    failure = None
    for _ in range(_PROCESSES):
        begun: list[str] = []

        def note(event: dict[str, Any], begun: list[str] = begun) -> None:
            if "cases" in event:
                cases[:] = event["cases"]
                return
            if "start" in event:
                begun.append(event["start"])
                return
            if "case" in event:
                if event["case"] in begun:
                    begun.remove(event["case"])
                if event["case"] in seen:
                    return
                if "skipped" not in event:
                    seen.add(event["case"])
            emit(event)

        left = max(end - time.monotonic(), 0.0)
        skip = tuple(sorted(seen))
        rest = dataclasses.replace(settings, seconds=left, skip=skip)
        failure = _run(module, rest, note, env, tool)
        if failure is None or not begun:
            return failure
        seen.add(begun[0])
        emit({"case": begun[0], "error": f"the process died of it: {failure}"})
        remaining = [key for key in cases if key not in seen]
        if time.monotonic() > end:
            for key in remaining:
                emit({"case": key, "skipped": _NO_TIME})
            remaining = []
        if not remaining:
            return None
    return failure


def _run(
    module: str, settings: Settings, emit: Emit, env: dict[str, str], tool: tuple[str, ...]
) -> str | None:
    variables = {**os.environ, **env}
    variables = {name: value for name, value in variables.items() if value}
    paths = [str(_ROOT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        tempfile.TemporaryDirectory(prefix="fdq-section-") as directory,
    ):
        # A file: an argument has 128 KiB at most, and the cases of peers may be more.
        path = pathlib.Path(directory) / "settings.json"
        path.write_text(json.dumps(dataclasses.asdict(settings)), "utf-8")
        process = subprocess.Popen(
            [*tool, sys.executable, "-m", module, str(path)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=variables,
            start_new_session=True,  # a tool has the section for a child: both are ended
        )

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        late = threading.Event()  # the timer's thread may live on while the pipe is closed already

        def end_late() -> None:
            late.set()
            end()

        grace = _GRACE if not settings.smoke else 600.0
        timer = threading.Timer(settings.seconds + grace, end_late)
        timer.start()
        try:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    if line.startswith(_MARK):
                        emit(json.loads(line.removeprefix(_MARK)))
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                end()
                process.wait()
        if code == 0:
            return None
        if late.is_set():
            return f"ended after {settings.seconds + grace:.0f} s"
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
        # What `faulthandler` writes begins so; its last line is a place in some thread.
        hung = [line for line in lines if line.startswith("Timeout (")]
        last = (hung or lines or ["no message"])[-1]
        return f"exit code {code}: {last[:300]}"


def section_main(run: Callable[[Settings, Emit], None]) -> None:
    """The `main` of a section's module: settings from a file, reports to stdout."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("this is a part of `python -m benchmarks.gpu`, which calls it")
    # Libraries print to stdout as they like: reports have a stream of their own.
    with os.fdopen(os.dup(1), "w", buffering=1) as stream:

        def emit(event: dict[str, Any]) -> None:
            stream.write(_MARK + json.dumps(event) + "\n")

        with contextlib.redirect_stdout(sys.stderr):
            run(Settings.read(sys.argv[1]), emit)
