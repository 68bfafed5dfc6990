"""Which kernel is worth using on this GPU, and how it is cut: refreshes pallas_kernels/tuning.

Times each kernel's own choice, changes of it, and XLA, for classes of sizes, and writes the table
that fdq reads from then on: after every class, rows that were measured before stay where this run
has no new ones. A row rules the sizes of its class alone; what there was no time for, and what was
too noisy to time, keeps what it had: rows of an earlier run, or the defaults.

    python -m benchmarks.tune                              # writes tuning/<device>.json, 9 minutes
    python -m benchmarks.tune --only decode_attention      # adds to it or renews a part of it
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

from benchmarks import atomic_file
from benchmarks.gpu import Run, wide_console
from benchmarks.gpu_child import Settings, start_section
from benchmarks.gpu_tuning import OWN, ROWS, XLA
from pallas_kernels.tuning import choices

KERNELS = ("matrix_vector", "decode_attention", "gathered_matrix_vector")
TABLES = pathlib.Path(__file__).parent.parent / "pallas_kernels" / "tuning"

_GAIN = 1.03
"""How much faster than the kernel's own choice something must be to take its place."""


def relative(measured: dict[str, Any]) -> dict[str, float]:
    """Geometric mean, over the shapes of a class, of a candidate's time by the own choice's.

    Candidates without a time for one of the shapes are left out. XLA alone is left where the
    kernel does not run; nothing, where its time is not known.
    """
    shapes = [one["entries"] for one in measured["shapes"]]

    def timed(name: str) -> bool:
        return all("seconds" in shape.get(name, {}) for shape in shapes)

    if not timed(OWN):
        fails = any(_failed(shape.get(OWN, {})) for shape in shapes)
        return {XLA: 0.0} if fails and timed(XLA) else {}
    logs = {
        name: sum(math.log(s[name]["seconds"] / s[OWN]["seconds"]) for s in shapes)
        for name in shapes[0]
        if timed(name)
    }
    return {name: math.exp(total / len(shapes)) for name, total in logs.items()}


def _failed(entry: dict[str, Any]) -> bool:
    """Whether a kernel does not run; one that is too noisy to time, or found no memory, may."""
    if "seconds" in entry or entry.get("noisy"):
        return False
    return "RESOURCE_EXHAUSTED" not in entry.get("error", "")


def row_of(measured: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the tuning table for a class; None if it is not known what is the fastest.

    Of attention the classes are by size alone, and of experts the number of rows does not count.
    """
    times = relative(measured)
    if not times:
        return None
    row: dict[str, Any] = {"kernel": measured["kernel"], "formats": [measured["format"]]}
    if measured["kernel"] == "matrix_vector":
        row["max_rows"] = measured["rows"]
    for name in ("min_weights", "max_weights"):
        if measured[name] is not None:
            row[name] = measured[name]
    kernels = {name: time for name, time in times.items() if name != XLA}
    best = min(kernels, key=kernels.__getitem__) if kernels else None
    if best is not None and kernels[best] * _GAIN > 1:
        best = OWN
    if best is None or (XLA in times and times[XLA] * _GAIN < kernels[best]):
        return {**row, "use": "xla"}
    config = json.loads(best)
    return {**row, "use": "mosaic_gpu"} | ({"config": config} if config else {})


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with ``new`` ones in the place of those of the same classes, as they are looked up.

    Few rows of x and small weights come first. A row for up to 8 rows of x would rule 2 to 4 as
    well where they are not measured: there, a row that says what the defaults say goes before it.
    """
    known = {_class(row): row for row in (*rows, *new)}
    for row in new:
        below = [m for m in ROWS if m < row.get("max_rows", 0)]
        if below:
            gap = {**row, "max_rows": below[-1]}
            known.setdefault(_class(gap), _default(gap))

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return (
            (*choices.KERNELS, "*").index(row["kernel"]),
            "*" in row["formats"] or len(row["formats"]) > 1,
            row["formats"],
            row.get("max_rows", math.inf),
            row.get("max_weights", math.inf),
        )

    return sorted(known.values(), key=order)


def _class(row: dict[str, Any]) -> tuple[Any, ...]:
    bounds = (row.get(name) for name in ("max_rows", "min_weights", "max_weights"))
    return row["kernel"], tuple(row["formats"]), *bounds


def _default(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what devices without a table get."""
    weights = row.get("max_weights", row.get("min_weights", 1 << 30))
    kernel, formats, rows = row["kernel"], row["formats"], row["max_rows"]
    default = choices.choose("", kernel, formats[0], rows=rows, weights=weights)
    bounds = {name: value for name, value in row.items() if name not in ("use", "config")}
    return {**bounds, "use": default.use} | ({"config": default.config} if default.config else {})


def read_table(path: pathlib.Path, kind: str, *, counts: bool) -> list[dict[str, Any]]:
    """Rows of the table that a run adds to; none if there is no file yet.

    Raises:
      ValueError: the file is of another device, or its figures do not count and these do.
    """
    if not path.exists():
        return []
    table = json.loads(path.read_text("utf-8"))
    rows = choices.check(table, path.name)
    found = table.get("device_kind"), table.get("measured")
    if found != (kind, counts):
        raise ValueError(
            f"{path} is of {found[0]!r} with measured = {found[1]}, this run of {kind!r} with "
            f"measured = {counts}; name another file with --output."
        )
    return rows


def write_table(path: pathlib.Path, table: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    choices.check({"choices": rows}, path.name)
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    head = json.dumps(table, indent=2).removesuffix("\n}")
    atomic_file.write(path, f'{head},\n  "choices": [\n{lines}\n  ]\n}}\n')


def in_words(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    parts = [f"M <= {row['max_rows']}"] if "max_rows" in row else []
    if "min_weights" in row:
        parts.append(f"from {row['min_weights']:,} weights")
    if "max_weights" in row:
        parts.append(f"up to {row['max_weights']:,} weights")
    config = f" {row['config']}" if "config" in row else ""
    classes = ", ".join(parts) or "all sizes"
    return f"{row['kernel']} {row['formats'][0]}, {classes}: {row['use']}{config}"


def main(argv: list[str] | None = None) -> int:
    """Tunes, writes the table and says what is new in it; 1 if nothing could be timed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=KERNELS, help="these kernels (all)")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="(9)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on CPU; a file in /tmp")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="of the table")
    arguments = parser.parse_args(argv)
    arguments.no_peers, arguments.only, only = True, (), arguments.only
    console = wide_console()
    if arguments.smoke:
        console.print("Smoke run on CPU: kernels are interpreted, and the table means nothing.")
    run = Run(arguments, console)
    run.find_machine()
    machine = run.record["machine"]
    kind = machine["device_kind"]
    path = arguments.output
    if path is None:
        directory = pathlib.Path(tempfile.mkdtemp()) if arguments.smoke else TABLES
        path = directory / choices.file_name(kind)
    table = {
        "device_kind": kind,
        "measured": not arguments.smoke,
        "date": run.record["date"],
        "versions": machine["versions"],
        "command": "python -m benchmarks.tune",
    }
    try:
        rows = read_table(path, kind, counts=not arguments.smoke)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    found: list[dict[str, Any]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("tuning")

        def take(event: dict[str, Any]) -> None:
            progress.update(task, description=event.get("case", ""))
            if "error" in event:
                console.print(f"{event['case']}: {event['error']}", markup=False)
            if "shapes" not in event:
                return
            row = row_of(event)
            if row is None:
                console.print(f"{event['case']}: no row, for nothing is known", markup=False)
                return
            found.append(row)
            write_table(path, table, merged(rows, found))

        left = max(run.end - time.monotonic(), 0.0)
        settings = Settings(**{**vars(run.settings), "seconds": left, "more": {"only": only}})
        try:
            failure = start_section("benchmarks.gpu_tuning", settings, take, run.environment())
        except KeyboardInterrupt:
            failure = "interrupted"
    if failure:
        console.print(f"did not come to its end: {failure}", markup=False)
    for row in found:
        console.print(in_words(row), markup=False)
    if not found:
        console.print("nothing could be timed: no row is written")
        return 1
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
