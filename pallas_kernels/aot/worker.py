"""A process that compiles: imports jax once, then forks for each job.

    python -m pallas_kernels.aot.worker

reads jobs from standard input (8 bytes of length, then a pickle) and writes one report a line, as
JSON. A fork costs milliseconds where importing jax costs seconds, and leaves nothing behind: a
crash is one job's, and no cache of an earlier job hides a kernel from the dump.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

from jax.experimental import topologies as topologies  # imported once, for all forks
from jax.experimental.pallas import mosaic_gpu as mosaic_gpu

from pallas_kernels.aot import gpu_targets
from pallas_kernels.aot.ahead_of_time import compile_here, one_line
from pallas_kernels.aot.kernel_cases import all_cases
from pallas_kernels.aot.report import Report

_NO_INSTRUCTION = re.compile(r"Cannot select: intrinsic %llvm\.nvvm\.([\w.]+)")


def main() -> None:
    """Serves jobs until standard input ends, or until the parent ends it with SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _use_installed_libdevice()
    while header := sys.stdin.buffer.read(8):
        job = pickle.loads(sys.stdin.buffer.read(int.from_bytes(header, "little")))
        sys.stdout.write(json.dumps(_isolated(job)) + "\n")
        sys.stdout.flush()


def _isolated(job: dict[str, Any]) -> dict[str, Any]:
    """The report of one job, which runs in a fork."""
    with tempfile.TemporaryDirectory(prefix="fdq-aot-") as scratch:
        result = pathlib.Path(scratch) / "report.json"
        log = pathlib.Path(scratch) / "log.txt"
        child = os.fork()
        if child == 0:
            _run(job, result, log)
        status = _wait(child, job["timeout"])
        if result.is_file():
            return json.loads(result.read_text())
        if status is None:
            return _failed(job, f"still compiling after {job['timeout']:g} s, ended")
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        error = f"the compiler ended its process ({how}): {_last_words(log)}"
        if missing := _NO_INSTRUCTION.search(error):
            arch = gpu_targets.find(job["gpu"]).arch
            error = f"{arch} has no instruction {missing.group(1)}; {error}"
        return _failed(job, error)


def _failed(job: dict[str, Any], error: str) -> dict[str, Any]:
    return Report.failed(job["name"], job["kernel"], job["gpu"], error).to_dict()


def _run(job: dict[str, Any], result: pathlib.Path, log: pathlib.Path) -> None:
    """Compiles and ends the process. What libraries print goes to `log`."""
    try:
        os.setsid()  # so that ptxas ends with us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            case, gpu = _find_case(job), job["gpu"]
            report = compile_here(case, gpu, thorough=job["thorough"]).to_dict()
        except (LookupError, ImportError, AttributeError) as error:  # there is no such case here
            report = _failed(job, one_line(error))
        part = result.with_suffix(".part")
        part.write_text(json.dumps(report))
        part.rename(result)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _find_case(job: dict[str, Any]) -> Any:
    if job["case"] is not None:
        return pickle.loads(job["case"])
    for case in all_cases():
        if case.name == job["name"]:
            return case
    raise LookupError(
        f"case {job['name']!r} is not in kernel_cases.all_cases() and its `build` cannot be "
        "imported by another process: use a function of a module, or a functools.partial of one"
    )


def _wait(child: int, timeout: float) -> int | None:
    """The exit status of a child; None if it was ended after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
    except SystemExit:
        _end(child)
        raise
    _end(child)
    return None


def _end(child: int) -> None:
    """Ends a child and what it started, and waits for it."""
    for end in (os.killpg, os.kill):  # before its setsid there is no group
        try:
            end(child, signal.SIGKILL)
            break
        except ProcessLookupError:
            continue
    os.waitpid(child, 0)


def _last_words(log: pathlib.Path) -> str:
    """What a crashed compiler said: LLVM's error if there is one, else its last line."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if "LLVM ERROR" in line or "Check failed" in line]
    return one_line((errors or lines[-1:] or ["no message"])[0])


def _use_installed_libdevice() -> None:
    """Lets Mosaic find libdevice in the installed wheels rather than in a CUDA of the system."""
    package = importlib.util.find_spec("nvidia")
    for location in (package.submodule_search_locations or ()) if package else ():
        root = pathlib.Path(location) / "cu13"
        if (root / "nvvm" / "libdevice").is_dir():
            os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(root)


if __name__ == "__main__":
    main()
