"""One call that proves the kernels on a card nobody has seen, in six minutes at most.

In this order: versions and card; every kernel against float64, twice; the race and memory checks of
`compute-sanitizer`, where it is installed; percent of copy bandwidth of products and attention;
slices of models, with the slope to the whole one, and the seconds before their first step; prompts;
larger batches; torch's kernels on the same shapes; `ncu`, where it is installed. Every stage is a
process with a time limit of its own, and what it finds is printed and in the file as it is found.

    python -m benchmarks.gpu_proof                   # on a GPU
    python -m benchmarks.gpu_proof --smoke           # without one: does it all run?
    python -m benchmarks.gpu_proof --only right decode --minutes 3
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import tempfile
import time
from typing import Any

from rich.console import Console

from benchmarks import gpu
from benchmarks.gpu_child import Settings, start_section
from benchmarks.gpu_model import ModelCase
from benchmarks.gpu_report import rows_of, seconds, share, table
from benchmarks.gpu_steps import whole_models

_LEAST = 5.0  # seconds that are worth starting a process for
_CASE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
      name: for ``--only``.
      module: whose `run` it calls.
      seconds: no case is begun after so many.
      more: what the module is told.
      graphs: command buffers, a key of `benchmarks.gpu_model.GRAPHS`.
      tool: a command that runs the process, left out where it is not installed.
    """

    name: str
    module: str
    seconds: float
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    graphs: str = "default"
    tool: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Variables of the process, on top of those of every section."""
        own = ModelCase("", None, graphs=self.graphs).environment()
        if self.tool:
            # In one pool every address is legal, and the tool needs memory too.
            own |= {"XLA_CLIENT_MEM_FRACTION": "", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
        return own


def _sanitizer(check: str) -> Stage:
    tool = ("compute-sanitizer", "--tool", check, "--error-exitcode", "9")
    return Stage(check, "benchmarks.gpu_right", 20, {"few": True}, tool=tool)


_NCU = (
    "ncu",
    *("--kernel-name", "regex:matrix_vector|mma|decode_|attention"),
    *("--launch-count", "8", "--section", "SpeedOfLight", "--csv", "--log-file"),
)

STAGES = (
    Stage("right", "benchmarks.gpu_right", 60),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    Stage("products", "benchmarks.gpu_products", 40, {"proof": True}),
    Stage("attention", "benchmarks.gpu_attention", 30, {"proof": True}),
    Stage("decode", "benchmarks.gpu_steps", 50, {"part": "decode"}),
    Stage("graphs off", "benchmarks.gpu_steps", 12, {"part": "graphs off"}, graphs="off"),
    Stage("prompts", "benchmarks.gpu_steps", 20, {"part": "prompts"}),
    Stage("batches", "benchmarks.gpu_steps", 18, {"part": "batches"}),
    Stage("torch", "benchmarks.gpu_torch", 15, {"library": "torch"}),
    Stage("ncu", "benchmarks.gpu_right", 15, {"few": True}, tool=_NCU),
)


class Proof:
    """One run: its stages, its record and how much time is left."""

    def __init__(self, arguments: argparse.Namespace, console: Console):
        self.console = console
        # Record, environment and the card are those of the benchmark.
        options = ["--budget-minutes", str(arguments.minutes)]
        options += ["--smoke"] if arguments.smoke else []
        self.run = gpu.Run(gpu.parser().parse_args(options), console)
        self.run.record["command"] = "python -m benchmarks.gpu_proof"
        self.smoke: bool = arguments.smoke
        self.stages = [stage for stage in STAGES if stage.name in arguments.only]

    def start(self, stage: Stage, path: pathlib.Path) -> None:
        """One stage; what it finds is printed, and goes to the record."""
        record = self.run.record
        left = min(stage.seconds, self.run.end - time.monotonic())
        tool, more = stage.tool, dict(stage.more)
        if left < _LEAST and not self.smoke:
            self.note(stage, "left out for lack of time")
            return
        if tool and (self.smoke or shutil.which(tool[0]) is None):
            self.note(stage, f"{tool[0]} is not installed or has no GPU to look at")
            return
        if stage.name == "ncu":
            tool = (*tool, str(path.with_suffix(".ncu.csv")))
        if stage.name == "torch":
            rows = [*rows_of(record, "matmul"), *rows_of(record, "attention")]
            more["cases"] = [row for row in rows if row["m"] == 1]
            if not more["cases"]:
                return
        fields = {**vars(self.run.settings), "seconds": left, "more": more}
        settings = Settings(**{**fields, "case_seconds": _CASE_SECONDS})
        environment = self.run.environment() | ({} if self.smoke else stage.environment())
        known: list[dict[str, Any]] = []

        def take(event: dict[str, Any]) -> None:
            known.append(event)
            # Under a tool cases come again that are known; what counts is what the tool says.
            if not stage.tool:
                self.run.take(event)
            self.console.print(f"  {line(event)}", markup=False, soft_wrap=True)

        self.console.print(f"{stage.name} ({left:.0f} s at most)")
        failure = start_section(stage.module, settings, take, environment, tool)
        if stage.tool and failure is None:
            wrong = [event for event in known if "error" in event]
            right = [event for event in known if "difference" in event]
            failure = line(wrong[0]) if wrong else None if right else "no kernel ran in its time"
        record.setdefault("stages", []).append(
            {
                "name": stage.name,
                "cases": len(known),
                "failure": failure,
                "first": known[0].get("case") if known else None,
            }
        )
        if failure:
            self.note(stage, failure)
        elif stage.tool:
            checked = sum("difference" in event for event in known)
            self.note(stage, f"ran {checked} of {len(known)} kernels to their end, no error found")

    def note(self, stage: Stage, why: str) -> None:
        """Puts down why a stage has no result."""
        self.run.record["notes"].append(f"{stage.name}: {why}")
        self.console.print(f"{stage.name}: {why}", markup=False, soft_wrap=True)

    def all(self, path: pathlib.Path) -> None:
        """Every stage in turn; the record is written after each."""
        for stage in self.stages:
            try:
                self.start(stage, path)
            finally:
                record = self.run.record
                record["whole_models"] = whole_models(rows_of(record, "steps"))
                gpu.write_record(record, path)
        self.run.record["finished"] = True
        gpu.write_record(self.run.record, path)


def line(event: dict[str, Any]) -> str:
    """What a case found, in one line."""
    name = event.get("case", "")
    if "unavailable" in event:
        return event["unavailable"]
    if "error" in event:
        return f"{name}: FAILED: {event['error']}"
    if "skipped" in event:
        return f"{name}: {event['skipped']}"
    if event.get("section") == "right":
        return f"{name}: right, differs by {event['difference']:.1e}"
    if event.get("section") == "steps":
        parts = ("lowering", "compiling", "self_check")
        spent = ", ".join(
            f"{part.replace('_', '-')} {event[part + '_seconds']} s" for part in parts
        )
        first = f"first after {event['first_seconds']} s: {spent}"
        return f"{name}: {event['seconds'] * 1e3:.3f} ms ({first})"
    times = {name: entry.get("seconds") for name, entry in event.get("entries", {}).items()}
    known = [f"{name} {1e6 * spent:.2f} us" for name, spent in times.items() if spent]
    wrong = [str(e["error"]) for e in event.get("entries", {}).values() if "error" in e]
    return f"{name}: {', '.join(known + wrong)}"


def show(record: dict[str, Any], console: Console) -> None:
    """Measured against what the copy bandwidth would allow, then the figures to be reached."""
    machine, counts = record["machine"], record["counts"]
    bandwidth = machine.get("copy_bandwidth")
    rows = []
    for row in [*rows_of(record, "matmul"), *rows_of(record, "attention")]:
        for name in row["entries"]:
            spent, part = seconds(row, name), share(row, name, machine)
            if spent is None or not bandwidth or not counts:
                continue
            least = row["bytes"] / bandwidth
            part_of = "–" if part is None else f"{part:.0%}"
            measured = (f"{least * 1e6:.2f} us", f"{spent * 1e6:.2f} us", part_of)
            rows.append((f"{row['case']}, {name}", *measured))
    for model in record.get("whole_models", ()):
        if not bandwidth or not counts:
            continue
        least = model["bytes"] / bandwidth
        name = f"{model['model']} {model['scheme']}, by slope, command buffers {model['graphs']}"
        spent = model["seconds"]
        rate = f"{least / spent:.0%}, {1 / spent:.0f} tokens/s"
        rows.append((name, f"{least * 1e3:.3f} ms", f"{spent * 1e3:.3f} ms", rate))
    if rows:
        columns = ["case", "at copy bandwidth", "measured", "share"]
        console.print(table("Measured against predicted", columns, rows))
    steps = {row["case"]: row["seconds"] for row in rows_of(record, "steps")}
    for name, spent in steps.items():
        console.print(f"{name}: {spent * 1e3:.3f} ms" if counts else f"{name}: ran")
    for check in record["checks"]:
        state = {True: "reached", False: "MISSED", None: "not measured"}[check["met"]]
        console.print(f"{state}: {check['figure']}: {check['measured']}", markup=False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in STAGES]
    made.add_argument("--only", nargs="+", choices=names, default=names, help="these stages (all)")
    made.add_argument("--minutes", type=float, default=5.0, help="for all of it (5)")
    made.add_argument("--smoke", action="store_true", help="tiny shapes on CPU; no figure counts")
    made.add_argument(
        "--output", type=pathlib.Path, metavar="DIR", help="of the JSON file (benchmarks/results)"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; 1 if a kernel was wrong or a stage died."""
    arguments = parser().parse_args(argv)
    console = gpu.wide_console()
    directory = arguments.output
    if directory is None:
        directory = pathlib.Path(tempfile.mkdtemp()) if arguments.smoke else gpu.RESULTS
    proof = Proof(arguments, console)
    proof.run.find_machine()
    record = proof.run.record
    path = gpu.result_path(record, directory, "-proof")
    try:
        proof.all(path)
    except KeyboardInterrupt:
        console.print("interrupted: this is what there is")
        gpu.write_record(record, path)
    show(record, console)
    console.print(f"wrote {path}", soft_wrap=True)
    wrong = [row["case"] for row in record["results"] if "error" in row]
    # Whoever may not read performance counters has no profile; the kernels are none the worse.
    died = [
        stage["name"]
        for stage in record.get("stages", ())
        if stage["failure"] and stage["name"] != "ncu"
    ]
    for name in (*wrong, *died):
        console.print(f"FAILED: {name}", style="red", markup=False)
    return int(bool(wrong or died) or not record["results"])


if __name__ == "__main__":
    raise SystemExit(main())
