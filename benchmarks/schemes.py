"""What every scheme costs on the shipped model: `python -m benchmarks.schemes`.

Each scheme converts the shipped model, is loaded, predicts held-out text through its own KV cache,
and decodes. Prints the table of docs/schemes.md, writes `benchmarks/results/schemes-<date>.json`,
and exits with 1 if a bar is missed.

    python -m benchmarks.schemes --page docs/schemes.md      # also rewrites the table there
    python -m benchmarks.schemes --scheme W4A16 --plot bits.png
    python -m benchmarks.schemes --window 2048 --scheme W16A16C4-kvblock   # long contexts
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import sys
import tempfile
import time
from typing import Any

import fdq
from benchmarks import page
from fdq import text_table
from fdq.analysis.comparison import WINDOW, Comparison, Row
from fdq.schemes.recipe import Recipe

# Every name of the mission, and neighbours that say what a part of a name costs.
SCHEMES = (
    "WINT8",
    "WINT4",
    "block_wise_fp8",
    "WINT2",
    "mix_quant",
    "W8A8C8",
    "W8A8C16",
    "W4A16C16",
    "WNF4A8C8",
    "Wfp8Afp8",
    "Wfp8Afp8Cfp8",
    "W4Afp8",
    "W4A8C8",
    "W8A16C8",
    "W4A16C8",
    "W4A16C4",
    "tensor_wise_fp8",
    "MXFP8",
    "MXFP4",
    "NVFP4",
    "W3",
    "W2",
    "W16A16C8",
    "W16A16Cfp8",
    "W16A16C4",
    "W16A16C8-kvchannel",
    "W16A16C4-kvcentered",
    "W16A16C4-kvblock",
    "W16A16C3-kvblock",
    "W16A16C2-kvblock",
)
RESULTS = pathlib.Path(__file__).parent / "results"
PART = "schemes"
# What `fdq schemes` shows.
MEASURED = pathlib.Path(fdq.__file__).parent / "schemes" / "measured.json"


def missed_bars(rows: list[Row]) -> list[str]:
    """The bars that a row misses: bits per byte beside the original's, in the same run."""
    original = _bits_per_byte(rows[0])
    missed = []
    for row in rows[1:]:
        bar = _bar(row.name)
        distance = _bits_per_byte(row) - original
        if bar is not None and abs(distance) > bar:
            missed.append(f"{row.name}: {distance:+.4f} bits per byte, the bar is {bar}")
    return missed


def _bar(name: str) -> float | None:
    """Allowed distance in bits per byte, None without a bar."""
    name = name.upper()
    if name in ("WINT8",) or name.startswith("W8"):
        return 0.005
    if name in ("WINT4", "W4A16C16", "W4A16C8"):
        return 0.02
    if name.startswith("W16A16C8"):
        return 0.002
    return None


def markdown(rows: list[Row]) -> str:
    """The table of docs/schemes.md."""
    original = _bits_per_byte(rows[0])
    columns = (
        "scheme",
        "bits/weight, quantized",
        "all",
        "bits/byte",
        "Δ",
        "KL to the original (nats/token)",
    )
    columns += ("same top token", "cache bytes/token")
    cells = []
    for row in rows:
        report, bits = row.report, _bits_per_byte(row)
        weights = report.quantized_bits_per_weight, report.bits_per_weight
        figures = *(f"{n:.3f}" if n else "—" for n in weights), f"{bits:.4f}"
        figures += (f"{bits - original:+.4f}",)
        distance = f"{report.kl_nats_per_token:.5f}", f"{report.top1_agreement:.1%}"
        cells.append((row.name, *figures, *distance, f"{report.cache_bytes_per_token:,.0f}"))
    return text_table.markdown(columns, cells)


def measured(date: str, rows: list[Row]) -> str:
    """The table's figures as JSON, a row a line."""
    lines = []
    for row in rows:
        report = row.report
        bits, quantized = report.bits_per_weight or 0, report.quantized_bits_per_weight
        figures = {
            "scheme": row.name,
            "quantized_bits_per_weight": None if quantized is None else round(quantized, 3),
            "bits_per_weight": round(bits, 3),
            "bits_per_byte": round(_bits_per_byte(row), 4),
            "kl_nats_per_token": round(report.kl_nats_per_token or 0, 5),
            "same_top_token": round(report.top1_agreement or 0, 3),
            "cache_bytes_per_token": round(report.cache_bytes_per_token or 0),
        }
        lines.append(f"  {json.dumps(figures)}")
    body = ",\n".join(lines)
    return f'{{\n "date": "{date}",\n "rows": [\n{body}\n ]\n}}\n'


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """KL to the original by scheme, least first; needs the extra `plots`."""
    points = [(r.name, _bits_per_weight(r), r.report.kl_nats_per_token or 0) for r in rows]
    draw(points, path)


def draw(points: list[tuple[str, float, float]], path: pathlib.Path) -> None:
    """One line for each (name, bits per weight, KL): a dot on a logarithmic axis."""
    import matplotlib.pyplot as plt

    points = sorted(points, key=lambda point: -point[2])
    names = [f"{name}  ({bits:.2f} bits)" for name, bits, _ in points]
    losses = [kl for _, _, kl in points]
    figure, axes = plt.subplots(figsize=(8, 0.27 * len(points) + 1), layout="constrained")
    axes.hlines(names, min(losses) / 2, losses, color="lightgray", linewidth=1)
    dots = axes.scatter(
        losses, names, c=[min(bits, 8.5) for _, bits, _ in points], cmap="viridis_r", s=34, zorder=2
    )
    figure.colorbar(dots, label="bits per weight (16-bit weights: darkest)", shrink=0.6)
    axes.set(
        xscale="log",
        xlabel="KL to the original (nats per token), through the KV cache",
        xlim=(min(losses) / 2, 1),
    )
    axes.margins(y=0.02)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bits_per_weight(row: Row) -> float:
    """Of the quantized weights, of all where none is."""
    return row.report.quantized_bits_per_weight or row.report.bits_per_weight or 0


def _bits_per_byte(row: Row) -> float:
    assert row.report.bits_per_byte is not None  # the text's bytes are known here
    return row.report.bits_per_byte


def main() -> int:
    """Measures the schemes that were asked for; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.schemes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--scheme",
        metavar="NAME",
        action="append",
        help="repeat it for more (all)",
    )
    parser.add_argument("--bytes", type=int, default=65_536, help="of held-out text (65536)")
    parser.add_argument(
        "--window", type=int, default=WINDOW, help="tokens of context at most (256)"
    )
    parser.add_argument("--dtype", help="of activations (the model's)")
    for option, help in (
        ("--page", "rewrite the table between the marks of this file"),
        ("--plot", "draw the KL of every scheme"),
    ):
        parser.add_argument(option, metavar="FILE", type=pathlib.Path, help=help)
    parser.add_argument(
        "--results",
        metavar="FOLDER",
        type=pathlib.Path,
        default=RESULTS,
        help="where the JSON goes (benchmarks/results)",
    )
    arguments = parser.parse_args()
    for name in arguments.scheme or ():
        try:
            Recipe.parse(name)
        except ValueError as error:
            parser.error(str(error))

    comparison = Comparison.of_shipped_model(
        text_bytes=arguments.bytes,
        prompt="import os\n\n\ndef ",
        dtype=arguments.dtype,
        window=arguments.window,
    )
    today = datetime.date.today().isoformat()
    path = arguments.results / f"schemes-{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = [comparison.original()]
    with tempfile.TemporaryDirectory(prefix="fdq-schemes-") as folder:
        for name in arguments.scheme or SCHEMES:
            rows.append(comparison.measure(name, pathlib.Path(folder) / name))
            # After each: a run that is stopped leaves what it measured.
            path.write_text(json.dumps(_result(today, comparison, rows), indent=1) + "\n", "utf-8")
            print(
                f"{name:<20} {_bits_per_byte(rows[-1]):.4f} bits/byte  "
                f"KL {rows[-1].report.kl_nats_per_token:.5f}  {time.perf_counter() - start:6.0f} s",
                file=sys.stderr,
            )
    table = markdown(rows)
    print(table)
    print(f"\nWritten: {path}", file=sys.stderr)
    if arguments.page:
        page.fill(arguments.page, PART, table)
        MEASURED.write_text(measured(today, rows), "utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    missed = missed_bars(rows)
    print("\n".join(missed) or "All bars are met.", file=sys.stderr)
    return 1 if missed else 0


def _result(date: str, comparison: Comparison, rows: list[Row]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "date": date,
        "text_sha256": comparison.text_sha256,
        "reference_text": comparison.is_reference_text,
        "text_bytes": comparison.text_bytes,
        "tokens": rows[0].report.tokens,
        "window": comparison.window,
        "machine": f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "numpy")},
        "missed_bars": missed_bars(rows),
        "rows": [row.to_dict() for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
