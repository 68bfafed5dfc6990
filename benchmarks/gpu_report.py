"""Tables, the list of figures that must be reached, and the plot of the GPU benchmark."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks.gpu_cases import KERNEL, LARGE
from benchmarks.gpu_timing import L2_TURNS
from fdq.cli.console import table

# Entries that are not somebody else's: ours alone, and ours through `fdq.matmul`.
_OWN = (KERNEL, "fdq", "normed", "gated")
_LARGE_CACHE = 64 << 20

_TITLES = {
    "matmul": "Products, one weight of its own a launch",
    "experts": "Products with picked experts; bytes are those of the experts that are hit",
    "attention": "Attention of one new token a sequence; bytes are those of the cache",
    "append": "Rotation, quantization and writing of one new token, of one layer",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """A figure that must be reached.

    Attributes:
      figure: in words, with the bar.
      measured: in words; "" if it was not.
      met: None where nothing was measured, or the bar is for another device.
    """

    figure: str
    measured: str
    met: bool | None


def seconds(row: dict[str, Any], name: str) -> float | None:
    """Time of an entry; None if it has none."""
    return row.get("entries", {}).get(name, {}).get("seconds")


def share(row: dict[str, Any], name: str, machine: dict[str, Any]) -> float | None:
    """Bytes by time, as a part of the measured copy bandwidth.

    None without a time, and where some of the bytes may have come from the L2 cache: of operands
    that are not four times as large.
    """
    time, bandwidth = seconds(row, name), machine.get("copy_bandwidth")
    if time is None or not bandwidth:
        return None
    sizes = {**row, **row["entries"][name]}
    if sizes.get("l2_ratio", L2_TURNS) < L2_TURNS:
        return None
    return sizes["bytes"] / time / bandwidth


def rows_of(record: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Measured cases of a section."""
    return [r for r in record["results"] if r.get("section") == section]


def peers_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of others' entries that have a time somewhere, in order of appearance."""
    names = (name for row in rows for name, e in row["entries"].items() if "seconds" in e)
    return [name for name in dict.fromkeys(names) if name != KERNEL]


def checks(record: dict[str, Any]) -> list[Check]:
    """The figures that must be reached, each with what this run found; a smoke run finds none."""
    if not record["counts"]:
        record = {**record, "results": []}
    machine = record["machine"]
    matmul = [r for r in rows_of(record, "matmul") if r["m"] == 1 and r["bytes"] >= LARGE]
    found = [
        _share_check("W4A16, one row, matrices of 24 MiB and more", matmul, "W4A16", 0.70, machine),
        _peer_check("W4A16, one row, the same matrices", matmul, "W4A16"),
        _share_check("W8A16, one row, matrices of 24 MiB and more", matmul, "W8A16", 0.82, machine),
    ]
    attention = [r for r in rows_of(record, "attention") if r["bytes"] >= _LARGE_CACHE]
    for scheme, bar in (("C16", 0.80), ("C8", 0.75), ("C4", 0.50)):
        name = f"decode attention {scheme}, caches of 64 MiB and more"
        found.append(_share_check(name, attention, scheme, bar, machine))
    found.append(_decode_check(record))
    return found


def _share_check(
    name: str, rows: list[dict[str, Any]], scheme: str, bar: float, machine: dict[str, Any]
) -> Check:
    figure = f"{name}: at least {bar:.0%} of copy bandwidth"
    shares = [share(row, KERNEL, machine) for row in rows if row["scheme"] == scheme]
    known = [s for s in shares if s is not None]
    if not known:
        return Check(figure, "", None)
    lowest, middle = min(known), statistics.median(known)
    lacking = len(shares) - len(known)
    text = f"{lowest:.1%} at worst, {middle:.1%} in the middle of {len(known)}"
    text += f"; {lacking} without a time" if lacking else ""
    return Check(figure, text, lowest >= bar and not lacking)


def _peer_check(name: str, rows: list[dict[str, Any]], scheme: str) -> Check:
    figure = f"{name}: faster than every peer, our partial sums added up"
    worst: tuple[float, str] | None = None
    count = 0
    for row in rows:
        own = seconds(row, "fdq") or seconds(row, KERNEL)
        if row["scheme"] != scheme or own is None:
            continue
        for peer, entry in row["entries"].items():
            if peer in _OWN or "seconds" not in entry:
                continue
            count += 1
            ratio = entry["seconds"] / own
            if worst is None or ratio < worst[0]:
                worst = ratio, f"{peer}, {row['model']} {row['layer']}"
    if worst is None:
        return Check(figure, "", None)
    text = f"{worst[0]:.2f}x the fastest ({worst[1]}), {count} comparisons"
    return Check(figure, text, worst[0] > 1)


def _decode_check(record: dict[str, Any]) -> Check:
    figure = "Llama-3-8B W4A16C8, one sequence, on an H200: at least 500 tokens/s"
    rates = [
        row["tokens_per_second"]
        for row in rows_of(record, "model")
        if row["model"] == "llama-3-8b"
        and row["scheme"] == "W4A16C8"
        and row["implementation"] != "xla"
        and not row["note"]
    ]
    if not rates:
        return Check(figure, "", None)
    kind = record["machine"]["device_kind"]
    if "H200" not in kind:
        return Check(
            figure, f"{max(rates):.0f} tokens/s on {kind}, for which there is no bar", None
        )
    return Check(figure, f"{max(rates):.0f} tokens/s", max(rates) >= 500)


def wrong_results(record: dict[str, Any]) -> list[str]:
    """Entries of ours whose result differed from the reference."""
    found = []
    for row in record["results"]:
        for name in _OWN:
            error = row.get("entries", {}).get(name, {}).get("error", "")
            if error.startswith("wrong"):
                found.append(f"{row['case']}, {name}: {error}")
        if "differ from XLA" in row.get("error", ""):
            found.append(f"{row['case']}: {row['error']}")
    return found


def print_report(record: dict[str, Any], console: Console) -> None:
    """All tables, what could not be measured, and the list of figures."""
    for section in _TITLES:
        _print_section(section, rows_of(record, section), record, console)
    _print_models(rows_of(record, "model"), record, console)
    _print_failures(record, console)
    marks = {True: "met", False: "MISSED", None: "not measured"}
    rows = []
    for check in checks(record):
        mark = marks[check.met] if check.met is not None or not check.measured else "no bar here"
        rows.append((check.figure, check.measured or "–", mark))
    console.print(table(None, ["figure that must be reached", "measured", ""], rows))


def label(row: dict[str, Any]) -> str:
    """A case in few words."""
    name = f"{row['scheme']} {row['model']}"
    if "layer" in row:
        hit = f", {row['experts_hit']:.0f} experts" if "experts_hit" in row else ""
        return f"{name} {row['layer']} {row['k']} x {row['n']}, M = {row['m']}{hit}"
    return f"{name}, {row['m']} x {row['slots']} tokens"


def _print_section(
    section: str, rows: list[dict[str, Any]], record: dict[str, Any], console: Console
) -> None:
    machine, counts = record["machine"], record["counts"]
    if not rows:
        return
    peers = peers_of(rows)
    lines = []
    for row in rows:
        own, part = seconds(row, KERNEL), share(row, KERNEL, machine)
        cells = [f"{row['bytes'] / 1e6:.1f}"]
        if counts:
            cells += [
                "–" if own is None else f"{own * 1e6:.2f}",
                "–" if part is None else f"{part:.1%}",
            ]
        else:
            cells += ["–" if own is None else "ran", "" if own is None else "no figure"]
        for peer in peers:
            other = seconds(row, peer)
            if other is None or own is None:
                cells.append("–")
            else:
                cells.append(f"{other / own:.2f}x" if counts else "ran")
        lines.append((label(row), *cells))
    columns = ["case", "MB", "kernel, us", "bandwidth", *(f"{peer} / kernel" for peer in peers)]
    console.print(table(_TITLES[section], columns, lines))
    if section == "matmul":
        console.print(
            "kernel: float32 partial sums, as the next kernel takes them; fdq: fdq.matmul, which "
            "adds them up and rounds, as all others do."
        )


def _print_models(rows: list[dict[str, Any]], record: dict[str, Any], console: Console) -> None:
    if not rows:
        return
    bandwidth, counts = record["machine"].get("copy_bandwidth"), record["counts"]
    columns = ["model", "tokens/s", "a token", "bytes", "of bandwidth", "compiled in"]
    lines = []
    for row in rows:
        part = row["bytes"] / row["seconds"] / bandwidth if bandwidth else None
        name = row["case"] + (f" ({row['note']})" if row["note"] else "")
        line = (
            name,
            f"{row['tokens_per_second']:.1f}" if counts else "ran",
            f"{row['seconds'] * 1e3:.3f} ms" if counts else "no figure",
            f"{row['bytes'] / 1e9:.2f} GB",
            "–" if part is None or not counts else f"{part:.1%}",
            f"{row['compile_seconds']:.0f} s",
        )
        lines.append(line)
    title = "Whole-model decoding, one sequence, one jitted loop"
    console.print(table(title, columns, lines))


def _print_failures(record: dict[str, Any], console: Console) -> None:
    """Each reason once, with how often it was met."""
    counted: dict[tuple[str, str], list[str]] = {}
    for row in record["results"]:
        if "error" in row:
            counted.setdefault(("case", row["error"]), []).append(row["case"])
        for name, entry in row.get("entries", {}).items():
            if "error" in entry:
                counted.setdefault((name, entry["error"]), []).append(row["case"])
        for line in row.get("log", ()):
            if "switched off" in line:
                counted.setdefault(("kernel", line), []).append(row["case"])
    for (name, error), cases in counted.items():
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        console.print(f"{name}: {cases[0]}{more}: {error}", markup=False)
    for line in record["notes"]:
        console.print(line, markup=False)
    skipped = len(record["skipped"])
    if skipped:
        console.print(
            f"{skipped} cases were left out for lack of time; --budget-minutes gives more."
        )


def plot(record: dict[str, Any], path: Any) -> None:
    """Bars of the bandwidth that products reach, and attention over the context.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    machine = record["machine"]
    rows = [r for r in rows_of(record, "matmul") if r["m"] == 1]
    rows = [r for r in rows if share(r, KERNEL, machine) is not None]
    height = 2.0 + 0.2 * len(rows)
    figure = Figure(figsize=(11, max(height, 4.0)), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    labels = [f"{r['scheme']} {r['model']} {r['layer']}" for r in rows]
    colors = {"W4A16": "tab:blue", "W8A16": "tab:orange"}
    bars.barh(
        range(len(rows)),
        [100 * (share(r, KERNEL, machine) or 0) for r in rows],
        color=[colors.get(r["scheme"], "tab:gray") for r in rows],
    )
    bars.set_yticks(range(len(rows)), labels, fontsize=7)
    bars.invert_yaxis()
    bars.set_xlabel("percent of the measured copy bandwidth, one row")
    attention = [r for r in rows_of(record, "attention") if r["m"] == 1]
    for scheme in dict.fromkeys(r["scheme"] for r in attention):
        known = [r for r in attention if r["scheme"] == scheme and r["model"] == "llama-3-8b"]
        points = sorted((r["slots"], share(r, KERNEL, machine)) for r in known)
        points = [(slots, 100 * part) for slots, part in points if part is not None]
        if points:
            lines.plot(*zip(*points, strict=True), marker="o", label=scheme)
    lines.set_xscale("log", base=2)
    lines.set_xlabel("tokens in the cache, one sequence")
    lines.set_ylabel("percent of the measured copy bandwidth")
    lines.set_ylim(bottom=0)
    if lines.lines:
        lines.legend()
    for axes in (bars, lines):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    smoke = "" if record["counts"] else " (smoke run: no figure counts)"
    figure.suptitle(f"{machine['device_kind']}, {record['date']}{smoke}")
    figure.savefig(path, dpi=150)
