"""The CPU tables of docs/cpu.md, from runs of `benchmarks.cpu --json` on different makes.

python -m benchmarks.cpu_table cpu.json             # of your own run
python -m benchmarks.cpu_table --page docs/cpu.md    # of the committed ones
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from benchmarks import page
from fdq.text_table import markdown

PART = "cpu"
RESULTS = pathlib.Path(__file__).parent / "results"
COMMITTED = ("cpu-2026-11-28.json", "cpu-avx512-2026-11-29.json", "cpu-amx-2026-11-28.json")
"""Of `RESULTS`, what docs/cpu.md shows."""

_DENSE = "float32 dense"
_BY_ROWS = ("W8A16 prepared", "W4A16", "W3A16", "W2A16", "WNF4A16")
_OMITTED = ("bfloat16 dense, padded", "bfloat16 dense [N, K], padded", "W8A8")
_MATMUL = re.compile(r"matmul \[(\d+), (\d+)\] x \[\d+, (\d+)\]")


@dataclasses.dataclass(frozen=True)
class Run:
    """What `benchmarks.cpu --json` wrote.

    Attributes:
      file: its name.
      record: title of a table -> its rows, and `machine`.
    """

    file: str
    record: dict[str, Any]

    @classmethod
    def read(cls, path: pathlib.Path) -> Run:
        """Raises ValueError where the file is not of a whole `benchmarks.cpu --json`."""
        expected = f"{path}: expected what `python -m benchmarks.cpu --json FILE` wrote"
        try:
            record = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{expected}, found no JSON: {error}") from None
        if not isinstance(record, dict) or "cpu" not in record.get("machine", {}):
            raise ValueError(expected)
        for start in ("matmul [1,", "attention,", "decode,"):
            if not any(title.startswith(start) for title in record):
                raise ValueError(f"{expected} without --only: it has no table {start!r}")
        return cls(path.name, record)

    @property
    def make(self) -> str:
        """For people: `AMD EPYC, AVX2`."""
        machine = self.record["machine"]
        cpu = re.sub(r"\(R\)|\(TM\)|Processor|CPU", "", machine["cpu"]).split("@")[0]
        return f"{' '.join(cpu.split())}, {machine['class'].upper()}"

    def products(self, rows: int, columns: int) -> dict[str, dict[str, Any]]:
        """Name -> timing of the products of `rows` with a weight of `columns`; empty if not run."""
        for title, timings in self.record.items():
            found = _MATMUL.fullmatch(title)
            if found and (int(found[1]), int(found[3])) == (rows, columns):
                return {timing["name"]: timing for timing in timings}
        return {}

    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each table of products."""
        found = [_MATMUL.fullmatch(title) for title in self.record]
        return [(int(match[1]), int(match[3])) for match in found if match]

    def last(self, start: str) -> dict[str, dict[str, Any]]:
        """Name -> timing of the last table whose title starts with `start`; empty if not run."""
        titles = [t for t in self.record if t.startswith(start) and not t.endswith("bars")]
        return {timing["name"]: timing for timing in self.record[titles[-1]]} if titles else {}


def _ratio(timings: dict[str, dict[str, Any]], name: str, base: str, by: str = "seconds") -> float:
    return timings[base][by] / timings[name][by]


def one_row(runs: Sequence[Run], columns: int) -> str:
    """Every path against dense float32, a column a run: by median, in brackets by the fastest."""
    tables = [run.products(1, columns) for run in runs]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    lines = []
    for name in names:
        if name in _OMITTED or (name.endswith("whole decoded") and not name.startswith("W4A16")):
            continue
        cells = [
            f"{_ratio(table, name, _DENSE):.2f} ({_ratio(table, name, _DENSE, 'fastest'):.2f})"
            for table in tables
        ]
        lines.append((name, f"{tables[0][name]['bytes'] / 1e6:.1f} MB", *cells))
    return markdown(["path", "bytes read", *(run.make for run in runs)], lines)


def more_rows(runs: Sequence[Run]) -> str:
    """The weight-only paths by rows of x, by median, the columns of the weights side by side."""
    rows = sorted({m for run in runs for m, _ in run.shapes()})
    lines = []
    for run in runs:
        columns = sorted({n for _, n in run.shapes()})
        for name in _BY_ROWS:
            cells = []
            for m in rows:
                tables = [run.products(m, n) for n in columns]
                found = [f"{_ratio(t, name, _DENSE):.1f}" for t in tables if name in t]
                cells.append(" / ".join(found) or "–")
            lines.append((f"{run.make}: {name}", *cells))
    return markdown(["rows of x", *map(str, rows)], lines)


def against(runs: Sequence[Run], start: str, base: str, omitted: str) -> str:
    """The last table of a kind against one of its rows, a column a run, by median."""
    tables = [run.last(start) for run in runs]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    lines = [
        (name, *(f"{_ratio(table, name, base):.2f}" for table in tables))
        for name in names
        if not re.search(omitted, name)
    ]
    return markdown([f"against {base}", *(run.make for run in runs)], lines)


def text(runs: Sequence[Run]) -> str:
    """All that stands between the marks of docs/cpu.md."""
    columns = sorted({n for run in runs for _, n in run.shapes()})
    attention = [title for title in runs[0].record if re.match("attention,.*slots", title)][-1]
    machines = {(run.record["machine"]["cores"], run.record["machine"]["jax"]) for run in runs}
    cores, jax = (" or ".join(map(str, sorted(set(each)))) for each in zip(*machines, strict=True))
    parts = [
        f"One token, 4096 x {columns[0]}, against dense float32: by median, in brackets by the "
        'fastest repetition; "prepared" is how a loaded model is laid out.',
        one_row(runs, columns[0]),
        f"More rows of x at once, by median, {' / '.join(map(str, columns))} columns:",
        more_rows(runs),
        "Decoding of one sequence by a random-weight Llama of 300 million parameters, bfloat16 "
        "in fdq's fastest form:",
        against(runs, "decode,", "bfloat16", "slots"),
        f"A{attention[1:]}:",
        against(runs, "attention,", "plain float32", "C32"),
        f"{cores} shared cores each, jax {jax}; from {', '.join(f'`{r.file}`' for r in runs)} in "
        "`benchmarks/results/`.",
    ]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables, or writes them to a page with marks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results", type=pathlib.Path, nargs="*", metavar="JSON", help="(the committed ones)"
    )
    parser.add_argument("--page", type=pathlib.Path, metavar="FILE", help="write them there")
    arguments = parser.parse_args(argv)
    results = arguments.results or [RESULTS / name for name in COMMITTED]
    try:
        made = text([Run.read(path) for path in results])
        if arguments.page is not None:
            page.fill(arguments.page, PART, made)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.page is None:
        print(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
