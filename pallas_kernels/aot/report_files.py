"""Reports of ahead-of-time compiles as files, and the table that is made from them.

`fdq kernels --all` writes one file for each version of jax; those that are part of the package lie
in `pallas_kernels/reports/`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence

from pallas_kernels.aot.report import KernelReport, Report

DIRECTORY = pathlib.Path(__file__).parent.parent / "reports"


def path_for(jax_version: str) -> pathlib.Path:
    """Where the package keeps the report of a version of jax."""
    return DIRECTORY / f"jax-{jax_version}.json"


def save(reports: Sequence[Report], path: pathlib.Path) -> None:
    """Writes reports of one version of jax, one a line; XLA's own kernels are left out."""
    lines = []
    for report in reports:
        ours = dataclasses.replace(report, kernels=report.mosaic_kernels, traceback="", sequence=())
        lines.append(json.dumps(ours.to_dict(), sort_keys=True))
    versions = sorted({report.jax for report in reports})
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(lines)
    path.write_text(f'{{"jax": {json.dumps(" ".join(versions))}, "reports": [\n{body}\n]}}\n')


def load(jax_version: str | None = None) -> list[Report]:
    """The package's reports: of this version of jax, else of the newest, or FileNotFoundError."""
    files = sorted(DIRECTORY.glob("jax-*.json"), key=_version)
    if not files:
        raise FileNotFoundError(
            f"no report in {DIRECTORY}; `fdq kernels --all` writes one (it takes minutes)"
        )
    wanted = path_for(jax_version) if jax_version else files[-1]
    content = json.loads((wanted if wanted in files else files[-1]).read_text())
    return [Report.from_dict(report) for report in content["reports"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one kernel on one GPU, over all its cases: the most that one of them takes.

    Instructions (see `Report`) are those of the first case that has any: the representative.
    """

    kernel: str
    gpu: str
    cases: int  # how many were compiled
    runs: bool  # all of them compiled, without spills
    reason: str  # why not, in one line; "" if it runs
    registers: int
    spill_bytes: int
    shared_memory_bytes: int
    tensor_core: bool  # whether one uses tensor cores
    instructions_per_weight: float | None
    instruction_budget: float | None


def rows(reports: Iterable[Report]) -> list[Row]:
    """One row for each kernel and GPU, in the order of the reports."""
    grouped: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        grouped.setdefault((report.kernel, report.gpu), []).append(report)
    return [_row(kernel, gpu, group) for (kernel, gpu), group in grouped.items()]


def by_kernel(reports: Iterable[Report]) -> dict[str, dict[str, str]]:
    """Of each kernel, by GPU: instructions per weight, "yes", "spills" or a dash."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows(reports):
        cells.setdefault(row.kernel, {})[row.gpu] = cell(row)
    return cells


def cell(row: Row) -> str:
    """A row in one word: instructions per weight where they were counted, else yes or no."""
    if row.spill_bytes:
        return "spills"
    if not row.runs:
        return "–"
    count = row.instructions_per_weight
    return "yes" if count is None else f"{count:.1f}"


def _row(kernel: str, gpu: str, reports: list[Report]) -> Row:
    ours: list[KernelReport] = [k for report in reports for k in report.mosaic_kernels]
    problems = [problem for report in reports for problem in report.problems()]
    failed = next((report.error for report in reports if not report.ok), "")
    counts = [r.instructions_per_weight for r in reports if r.instructions_per_weight is not None]
    budgets = [r.instruction_budget for r in reports if r.instruction_budget is not None]
    return Row(
        kernel=kernel,
        gpu=gpu,
        cases=len(reports),
        runs=not problems,
        reason=failed or (problems[0] if problems else ""),
        registers=max((k.registers for k in ours), default=0),
        spill_bytes=max((k.spill_bytes for k in ours), default=0),
        shared_memory_bytes=max((k.shared_memory_bytes for k in ours), default=0),
        tensor_core=any(k.tensor_core for k in ours),
        instructions_per_weight=next(iter(counts), None),
        instruction_budget=next(iter(budgets), None),
    )


def _version(path: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.stem.removeprefix("jax-").split(".") if part.isdigit())
