"""A few worker processes that compile; see `compile_worker` for what happens in one."""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from pallas_kernels.aot.kernel_cases import KernelCase
from pallas_kernels.aot.report import Report

# XLA's and JAX's settings of the parent could change or skip the compile (a cached executable is
# not dumped).
_DROPPED = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_DUMP_PTX")


def run_jobs(
    jobs: list[tuple[KernelCase, str]],
    *,
    processes: int,
    timeout: float,
    thorough: bool,
    update: Callable[[Report], None] | None,
) -> list[Report]:
    """One report for each (case, name of a GPU), in their order."""
    reports: dict[int, Report] = {}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    lock = threading.Lock()
    failures: list[BaseException] = []
    payloads = [_payload(case, gpu, timeout, thorough) for case, gpu in jobs]
    workers: list[_Worker] = []

    def work() -> None:
        try:
            with _Worker() as worker:
                workers.append(worker)
                while not failures:
                    try:
                        index = waiting.get_nowait()
                    except queue.Empty:
                        return
                    case, gpu = jobs[index]
                    report = worker.run(payloads[index], case, gpu)
                    with lock:
                        reports[index] = report
                        if update is not None:
                            update(report)
        except BaseException as error:  # handed to the thread that waits
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(max(1, min(processes, len(jobs))))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C
        failures.append(error)
        for worker in workers:
            worker.end()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
    return [reports[index] for index in range(len(jobs))]


def _payload(case: KernelCase, gpu: str, timeout: float, thorough: bool) -> bytes:
    """The job as bytes: the case itself, or the name of a registered one."""
    try:
        content = pickle.dumps(case)
    except (pickle.PicklingError, AttributeError, TypeError):
        content = None
    names = {"name": case.name, "kernel": case.kernel, "gpu": gpu}
    return pickle.dumps({"case": content, **names, "timeout": timeout, "thorough": thorough})


class _Worker:
    """A worker process, started again if it ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()

    def end(self) -> None:
        """Ends the process and what it compiles; `run` then reports that."""
        if self._process is not None:
            self._process.terminate()

    def run(self, payload: bytes, case: KernelCase, gpu: str) -> Report:
        """Sends one job and waits for its report."""
        if self._process is None or self._process.poll() is not None:
            self._process = _start()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(len(payload).to_bytes(8, "little") + payload)
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        if line:
            return Report.from_dict(json.loads(line))
        status = self._process.wait()
        problem = f"the worker process ended with status {status}"
        return Report.failed(case.name, case.kernel, gpu, problem)


def _start() -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in _DROPPED} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        # The worker forks, so it must have no threads.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    command = [sys.executable, "-m", "pallas_kernels.aot.worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
