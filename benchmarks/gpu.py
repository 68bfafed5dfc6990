"""How fast fdq's kernels are on this GPU, beside everything else that computes the same.

Measures the copy bandwidth first; every result is a part of it, and a ratio to each peer in the
same run: XLA, cuBLAS, cuDNN, and torch, gemlite and tokamax where they are installed. A peer or a
kernel that fails costs one line. Writes benchmarks/results/<device>-<date>.json and a plot; what is
measured is in the file after each part, and stays there if the run is interrupted.

    python -m benchmarks.gpu                             # everything, 8 minutes
    python -m benchmarks.gpu --only matmul attention     # a part of it
    python -m benchmarks.gpu --budget-minutes 40         # every shape at M = 1, 2, 4 and 8
    python -m benchmarks.gpu --smoke                     # without a GPU: does it all run?
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import atomic_file
from benchmarks.gpu_child import Settings, start_section
from benchmarks.gpu_model import CASES, ModelCase
from benchmarks.gpu_report import checks, plot, print_report, rows_of, seconds, wrong_results

SECTIONS = ("matmul", "attention", "model", "experts", "append")
RESULTS = pathlib.Path(__file__).parent / "results"

# Section -> (module, what it is told beside the settings, its part of the time).
_PARTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "matmul": ("benchmarks.gpu_products", {}, 27),
    "torch": ("benchmarks.gpu_torch", {"library": "torch"}, 5),
    "gemlite": ("benchmarks.gpu_torch", {"library": "gemlite"}, 3),
    "attention": ("benchmarks.gpu_attention", {}, 12),
    "torch attention": ("benchmarks.gpu_torch", {"library": "torch"}, 2),
    "experts": ("benchmarks.gpu_products", {"experts": True}, 6),
    "tokamax": ("benchmarks.gpu_tokamax", {}, 2),
    "append": ("benchmarks.gpu_attention", {"append": True}, 3),
    # Last: its cases take what they take.
    "model": ("benchmarks.gpu_model", {}, 40),
}
# Peers: the section whose cases they measure.
_PEERS = {
    "torch": "matmul",
    "gemlite": "matmul",
    "torch attention": "attention",
    "tokamax": "experts",
}
_FOR_PEERS = (
    "case",
    "section",
    "scheme",
    "model",
    "layer",
    "m",
    "k",
    "n",
    "rows",
    "experts",
    "slots",
    "heads",
    "kv_heads",
    "head_dim",
)
"""What peers are told about a case."""
_SHORTEST = 15.0  # seconds that are worth starting a process for


class Run:
    """One run of the benchmark: its record, its time and what it shows meanwhile."""

    def __init__(self, arguments: argparse.Namespace, console: Console):
        self.smoke: bool = arguments.smoke
        self.peers: bool = not arguments.no_peers
        self.sections = [s for s in SECTIONS if s in arguments.only]
        self.console = console
        self.end = time.monotonic() + 60 * arguments.budget_minutes
        self.record: dict[str, Any] = {
            "counts": not self.smoke,
            "date": datetime.date.today().isoformat(),
            "command": "python -m benchmarks.gpu" + (" --smoke" if self.smoke else ""),
            "finished": False,
            "machine": {},
            "results": [],
            "skipped": [],
            "notes": [],
        }
        self.by_case: dict[str, dict[str, Any]] = {}
        self.settings = Settings(smoke=self.smoke, seconds=120.0)

    def environment(self) -> dict[str, str]:
        """Of every process: all of the GPU's memory, or no GPU at all."""
        if self.smoke:
            return {
                "JAX_PLATFORMS": "cpu",
                "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of such a run
            }
        return {"XLA_CLIENT_MEM_FRACTION": "0.94", "XLA_PYTHON_CLIENT_MEM_FRACTION": ""}

    def find_machine(self) -> None:
        """Device, bandwidth and rate; what the other sections are told about them."""
        failure = start_section(
            "benchmarks.gpu_machine", self.settings, self.take, self.environment()
        )
        machine = self.record["machine"]
        if failure or not machine:
            raise SystemExit(f"the device could not be measured: {failure}")
        if machine["platform"] != "gpu" and not self.smoke:
            raise SystemExit(
                f"jax sees no GPU here, but {machine['device_kind']!r}. Install jax for GPUs "
                "(pip install -e '.[cuda12]' or '.[cuda13]'), or "
                "try everything on the CPU with --smoke."
            )
        capability = float(machine["compute_capability"] or 8.0)
        self.settings = Settings(
            smoke=self.smoke,
            seconds=0.0,
            dtype="bfloat16" if capability >= 8.0 else "float16",
            l2_bytes=_l2_bytes(machine["device_kind"]),
        )
        rates = [
            f"{label} {machine[name] * scale:.1f} {unit}"
            for label, name, scale, unit in (
                ("copies", "copy_bandwidth", 1e-9, "GB/s"),
                ("reads", "read_bandwidth", 1e-9, "GB/s"),
                (f"{machine['matrix_dtype']} products", "matrix_rate", 1e-12, "Tflop/s"),
            )
            if machine.get(name)
        ]
        self.console.print(f"{machine['device_kind']}: {', '.join(rates)}", highlight=False)

    def take(self, event: dict[str, Any]) -> None:
        """Puts a report of a section where it belongs."""
        if "machine" in event:
            self.record["machine"] = event["machine"]
        elif "unavailable" in event:
            self.record["notes"].append(event["unavailable"])
        elif "skipped" in event:
            self.record["skipped"].append(event["case"])
        elif event["case"] in self.by_case and "entries" in event:
            self.by_case[event["case"]]["entries"] |= event["entries"]
        elif event["case"] in self.by_case:
            self.record["notes"].append(f"{event['case']}: {event['error']}")
        else:
            self.by_case[event["case"]] = event
            self.record["results"].append(event)

    def start(self, part: str, take: Callable[[dict[str, Any]], None], left: float) -> None:
        """Runs one part in a process of its own, for at most ``left`` seconds."""
        module, more, _ = _PARTS[part]
        if part in _PEERS:
            cases = [
                row
                for row in rows_of(self.record, _PEERS[part])
                if seconds(row, "kernel") or seconds(row, "xla")
            ]
            # Those that a figure depends on, and one row, before all others.
            cases.sort(key=lambda row: (not row.get("urgent", False), row["m"]))
            if not cases:
                return
            told = [{name: row[name] for name in _FOR_PEERS if name in row} for row in cases]
            more = {**more, "cases": told}
        settings = Settings(**{**vars(self.settings), "seconds": left, "more": more})
        known = len(self.record["notes"])
        failure = start_section(module, settings, take, self.environment())
        for at in range(known, len(self.record["notes"])):
            self.record["notes"][at] = f"{part}: {self.record['notes'][at]}"
        if failure:
            self.record["notes"].append(f"{part} did not come to its end: {failure}")

    def start_models(self, take: Callable[[dict[str, Any]], None], left: float) -> None:
        """Whole models, each in a process with flags of its own.

        None is begun in less time than the one before took.
        """
        end, needed = time.monotonic() + left, _SHORTEST
        cases: tuple[ModelCase, ...] = CASES
        if self.smoke:
            # Kernels have cases of their own: a whole model takes the interpreter minutes.
            cases = (dataclasses.replace(CASES[0], implementation="xla"),)
        for case in cases:
            begun = time.monotonic()
            left = end - begun
            if left < needed and not self.smoke:
                self.record["skipped"].append(case.key)
                continue
            more = {
                "model": case.model,
                "scheme": case.scheme,
                "graphs": case.graphs,
                "implementation": case.implementation,
            }
            changes = {"seconds": left, "more": more, "case_seconds": 300.0}
            settings = Settings(**{**vars(self.settings), **changes})
            environment = {**self.environment(), **case.environment()}
            failure = start_section("benchmarks.gpu_model", settings, take, environment)
            needed = max(_SHORTEST, time.monotonic() - begun)
            if failure:
                self.record["notes"].append(f"{case.key}: {failure}")

    def run(self, save: Callable[[], None]) -> None:
        """All parts, each with its share of the time that is left, but for those that have none.

        Args:
          save: called after each part, and with what there is where one is interrupted.
        """
        parts = [p for p in _PARTS if _PEERS.get(p, p) in self.sections]
        parts = [p for p in parts if p not in _PEERS or self.peers]
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.completed:.0f} cases"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            for at, part in enumerate(parts):
                task = progress.add_task(part)

                def take(event: dict[str, Any], task: Any = task, part: str = part) -> None:
                    self.take(event)
                    progress.update(task, advance=1, description=f"{part}: {event.get('case', '')}")

                weight = sum(_PARTS[p][2] for p in parts[at:])
                whole = max(self.end - time.monotonic(), 0.0)
                if whole < _SHORTEST and not self.smoke:
                    self.record["notes"].append(f"{part}: left out for lack of time")
                    progress.remove_task(task)
                    continue
                left = max(whole * _PARTS[part][2] / weight, min(_SHORTEST, whole))
                try:
                    if part == "model":
                        self.start_models(take, left)
                    else:
                        self.start(part, take, left)
                finally:
                    save()
                progress.remove_task(task)
        self.record["finished"] = True
        save()


def _l2_bytes(device_kind: str) -> int:
    from pallas_kernels.aot.gpu_targets import of_device

    gpu = of_device(device_kind)
    return gpu.l2_bytes if gpu is not None else 64 << 20


def result_path(record: dict[str, Any], directory: pathlib.Path, kind: str = "") -> pathlib.Path:
    """``<device><kind>-<date>.json``, or with a number where that has been written before."""
    from pallas_kernels.tuning.choices import file_name

    device = file_name(record["machine"]["device_kind"]).removesuffix(".json") + kind
    path = directory / f"{device}-{record['date']}.json"
    number = 2
    while path.exists():
        path = directory / f"{device}-{record['date']}-{number}.json"
        number += 1
    return path


def write_record(record: dict[str, Any], path: pathlib.Path) -> None:
    """The record with the figures that it says something about, as JSON."""
    record["checks"] = [vars(check) for check in checks(record)]
    atomic_file.write(path, json.dumps(record, indent=1) + "\n")


def wide_console() -> Console:
    """Wide enough for the tables, whatever the terminal: a notebook's has 80 columns."""
    return Console(highlight=False, width=max(140, shutil.get_terminal_size().columns))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections (all)"
    )
    made.add_argument(
        "--budget-minutes",
        type=float,
        default=8.0,
        help="the important cases come first, and those that are left at the end are left out (8)",
    )
    made.add_argument("--smoke", action="store_true", help="tiny shapes on CPU; no figure counts")
    made.add_argument("--no-peers", action="store_true", help="without torch, gemlite and tokamax")
    made.add_argument(
        "--output", type=pathlib.Path, metavar="DIR", help="of JSON and plot (benchmarks/results)"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a kernel's result was wrong, or nothing could be measured."""
    arguments = parser().parse_args(argv)
    console = wide_console()
    if arguments.smoke:
        console.print("Smoke run on CPU: kernels are interpreted, and no figure below counts.")
    directory = arguments.output
    if directory is None:
        directory = pathlib.Path(tempfile.mkdtemp()) if arguments.smoke else RESULTS
    run = Run(arguments, console)
    run.find_machine()
    record = run.record
    path = result_path(record, directory)
    interrupted = False
    try:
        run.run(lambda: write_record(record, path))
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted: this is what there is")
    print_report(record, console)
    if arguments.smoke:
        console.print("This was a smoke run on CPU: no figure above counts.")
    console.print(f"wrote {path}", soft_wrap=True)
    try:
        plot(record, path.with_suffix(".png"))
        console.print(f"wrote {path.with_suffix('.png')}", soft_wrap=True)
    except ImportError as error:
        console.print(f"no plot: it needs matplotlib (pip install matplotlib): {error}")
    wrong = wrong_results(record)
    for line in wrong:
        console.print(f"WRONG: {line}", style="red", markup=False)
    if interrupted:
        return 130
    return int(bool(wrong) or not any("entries" in r or "seconds" in r for r in record["results"]))


if __name__ == "__main__":
    raise SystemExit(main())
