"""Which kernel is worth using on this GPU, and how it is cut: refreshes pallas_kernels/tuning.

Times each kernel's own choice, changes of it, and XLA, for classes of sizes, and writes the table
that fdq reads from then on. What there was no time for keeps the defaults.

    python -m benchmarks.tune                              # writes tuning/<device>.json
    python -m benchmarks.tune --budget-minutes 60          # every format
    python -m benchmarks.tune --smoke                      # without a GPU: does it all run?
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import tempfile
import time
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.gpu import Run, wide_console
from benchmarks.gpu_child import Settings, start_section
from benchmarks.gpu_tuning import OWN, XLA

KERNELS = ("matrix_vector", "decode_attention", "gathered_matrix_vector")
TABLES = pathlib.Path(__file__).parent.parent / "pallas_kernels" / "tuning"

_GAIN = 1.03
"""How much faster than the kernel's own choice something must be to take its place."""


def relative(measured: dict[str, Any]) -> dict[str, float]:
    """Geometric mean, over the shapes of a class, of a candidate's time by the own choice's.

    Candidates that failed for one of the shapes are left out.
    """
    shapes = [one["entries"] for one in measured["shapes"]]
    names = [name for name in shapes[0] if all("seconds" in s.get(name, {}) for s in shapes)]
    if OWN not in names:
        # The kernel does not run: whatever does is better.
        return {XLA: 0.0} if XLA in names else {}
    logs = {
        name: sum(math.log(s[name]["seconds"] / s[OWN]["seconds"]) for s in shapes)
        for name in names
    }
    return {name: math.exp(total / len(shapes)) for name, total in logs.items()}


def row_of(measured: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the tuning table for a class; None if nothing could be timed."""
    times = relative(measured)
    if not times:
        return None
    row: dict[str, Any] = {
        "kernel": measured["kernel"],
        "formats": [measured["format"]],
        "max_rows": measured["rows"],
    }
    if measured["bound"] is not None:
        row["max_weights"] = measured["bound"]
    kernels = {name: time for name, time in times.items() if name != XLA}
    best = min(kernels, key=kernels.__getitem__) if kernels else None
    if best is not None and kernels[best] * _GAIN > 1:
        best = OWN
    if best is None or (XLA in times and times[XLA] * _GAIN < kernels[best]):
        return {**row, "use": "xla"}
    config = json.loads(best)
    return {**row, "use": "mosaic_gpu"} | ({"config": config} if config else {})


def table_rows(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order in which they are looked up: few rows of x and small weights first.

    Of attention the classes are by size alone, and of experts the number of rows does not count.
    """
    rows = [row for one in measured if (row := row_of(one)) is not None]
    for row in rows:
        if row["kernel"] != "matrix_vector":
            del row["max_rows"]

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return (
            KERNELS.index(row["kernel"]),
            row["formats"],
            row.get("max_rows", 0),
            row.get("max_weights", math.inf),
        )

    return sorted(rows, key=order)


def main(argv: list[str] | None = None) -> int:
    """Tunes, writes the table and says what it says; 1 if nothing could be timed."""
    from pallas_kernels.choices import check, file_name

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=KERNELS, help="these kernels (all)")
    parser.add_argument("--budget-minutes", type=float, default=25.0, help="(25)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on CPU; a file in /tmp")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="of the table")
    arguments = parser.parse_args(argv)
    arguments.no_peers, arguments.only, only = True, (), arguments.only
    console = wide_console()
    if arguments.smoke:
        console.print("Smoke run on CPU: kernels are interpreted, and the table means nothing.")
    run = Run(arguments, console)
    run.find_machine()
    measured: list[dict[str, Any]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("tuning")

        def take(event: dict[str, Any]) -> None:
            progress.update(task, description=event.get("case", ""))
            if "shapes" in event:
                measured.append(event)
            elif "error" in event:
                console.print(f"{event['case']}: {event['error']}", markup=False)

        left = max(run.end - time.monotonic(), 0.0)
        settings = Settings(**{**vars(run.settings), "seconds": left, "more": {"only": only}})
        failure = start_section("benchmarks.gpu_tuning", settings, take, run.environment())
    if failure:
        console.print(f"did not come to its end: {failure}", markup=False)
    machine = run.record["machine"]
    kind = machine["device_kind"]
    table = {
        "device_kind": kind,
        "measured": not arguments.smoke,
        "date": run.record["date"],
        "versions": machine["versions"],
        "command": "python -m benchmarks.tune",
        "choices": table_rows(measured),
    }
    check(table, file_name(kind))
    for row in table["choices"]:
        size = f"up to {row['max_weights']:,} weights" if "max_weights" in row else "larger"
        rows = f"M <= {row['max_rows']}, " if "max_rows" in row else ""
        config = f" {row['config']}" if "config" in row else ""
        text = f"{row['kernel']} {row['formats'][0]}, {rows}{size}: {row['use']}{config}"
        console.print(text, markup=False)
    path = arguments.output
    if path is None:
        directory = pathlib.Path(tempfile.mkdtemp()) if arguments.smoke else TABLES
        path = directory / file_name(kind)
    if not table["choices"]:
        console.print("nothing could be timed: no table is written")
        return 1
    lines = ",\n".join("    " + json.dumps(row) for row in table.pop("choices"))
    head = json.dumps(table, indent=2).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n  "choices": [\n{lines}\n  ]\n}}\n')
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
