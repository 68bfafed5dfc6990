"""What calibrated quantizers leave of the shipped model: `python -m benchmarks.calibrated`.

`rotate+` before a scheme is for the model after `fdq.rotated`, with statistics of its own.

Second moments come from 98,304 tokens of the training split; predicted is held-out text, through
the cache, as by `benchmarks.schemes`. Prints a table with the bars that were set for each row,
writes `benchmarks/results/calibrated-<date>.json`, and exits with 1 if one is missed.

    python -m benchmarks.calibrated --row W4A16:gptq2 --row MXFP4:gptq2
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import sys
import tempfile
import time

import fdq
from benchmarks.schemes import RESULTS
from fdq import text_table
from fdq.analysis.comparison import Comparison, Row
from fdq.calibration.statistics import Calibration

ROWS = {
    "W4A16:gptq2": 0.0065,
    "NVFP4:gptq2": 0.0066,
    "MXFP4:gptq2": 0.0104,
    "WNF4A16:gptq2": 0.0064,
    "W3A16:gptq2": 0.026,
    "W2A16:gptq2": 0.133,
    "WINT2:ccq": 0.17,
    "WINT2:ccq2": 0.17,
    "rotate+WT2:ldlq2": None,
    "rotate+WT2": 0.175,
    "WT2:ldlq2": 0.058,
    "W4A16:gptq": None,
    "W3A16:gptq": None,
    "W2A16:gptq": None,
    "W4A16": None,
    "NVFP4": None,
    "MXFP4": None,
    "WNF4A16": None,
    "W3A16": None,
    "W2A16": None,
    "WINT2": None,
}
"""Scheme and quantizer (none: the default), and how large the KL in nats per token may be."""

ROTATED = "rotate+"

MOMENT_ROWS = 384
"""Of 256 tokens: with a third of them 2-bit trellis codes cost a twentieth more."""


def markdown(rows: list[Row]) -> str:
    """The table, the original first."""
    columns = ("scheme", "quantizer", "bits/weight", "bits/byte Δ", "KL (nats/token)", "bar")
    columns += ("same top token", "conversion")
    original = rows[0].report.bits_per_byte or 0.0
    cells = []
    for row in rows:
        scheme, _, method = row.name.partition(":")
        report, bar = row.report, ROWS.get(row.name)
        cells.append(
            (
                scheme,
                method or "—",
                f"{report.quantized_bits_per_weight or 16:.4f}",
                f"{(report.bits_per_byte or 0.0) - original:+.4f}",
                f"{report.kl_nats_per_token:.5f}",
                "—" if bar is None else f"{bar}",
                f"{report.top1_agreement:.2%}",
                f"{row.convert_seconds:.0f} s",
            )
        )
    return text_table.markdown(columns, cells)


def missed_bars(rows: list[Row]) -> list[str]:
    """The rows whose KL is above its bar."""
    missed = []
    for row in rows:
        bar, found = ROWS.get(row.name), row.report.kl_nats_per_token
        if bar is not None and (found is None or not found <= bar):  # which NaN is not, either
            said = "no KL" if found is None else f"{found:.5f} nats per token"
            missed.append(f"{row.name}: {said}, the bar is {bar}")
    return missed


def after_rotation(
    comparison: Comparison, folder: pathlib.Path
) -> tuple[pathlib.Path, Calibration]:
    """The rotated model as a checkpoint, and its statistics."""
    fdq.save(fdq.rotated(fdq.load(comparison.source, prepare=False)), folder)
    comparison.source = folder
    return folder, comparison.calibration(moments=True, output_moments=True, rows=MOMENT_ROWS)


def main() -> int:
    """Measures the rows that were asked for; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--row", metavar="SCHEME[:METHOD]", action="append", help="(all)")
    parser.add_argument("--bytes", type=int, default=65_536, help="of held-out text (65536)")
    parser.add_argument("--dtype", help="of activations (the model's)")
    parser.add_argument(
        "--calibration", metavar="FILE", type=pathlib.Path, help="statistics, read or else written"
    )
    parser.add_argument("--results", metavar="FOLDER", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    comparison = Comparison.of_shipped_model(
        text_bytes=arguments.bytes, prompt="import os\n", dtype=arguments.dtype
    )
    kept = arguments.calibration
    if kept is not None and kept.exists():
        calibration = Calibration.load(kept)
    else:
        calibration = comparison.calibration(moments=True, output_moments=True, rows=MOMENT_ROWS)
        if kept is not None:
            calibration.save(kept)
    plain, turned = (comparison.source, calibration), None
    path = arguments.results / f"calibrated-{datetime.date.today().isoformat()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = [comparison.original()]
    used = {}
    with tempfile.TemporaryDirectory(prefix="fdq-calibrated-") as folder:
        for index, name in enumerate(arguments.row or ROWS):
            scheme, _, method = name.removeprefix(ROTATED).partition(":")
            comparison.source, calibration = plain
            if name.startswith(ROTATED):
                turned = turned or after_rotation(comparison, pathlib.Path(folder) / "rotated")
                comparison.source, calibration = turned
            rows.append(
                comparison.measure(
                    scheme,
                    pathlib.Path(folder) / str(index),
                    name=name,
                    method=method or None,
                    # Rows without a method are those of today: nothing is calibrated.
                    calibration=calibration if method else None,
                    decodes=False,
                )
            )
            if method:
                used[name] = calibration.digest
            result = {
                "text_sha256": comparison.text_sha256,
                "calibration": used,
                "calibration_tokens": plain[1].tokens,
                "missed_bars": missed_bars(rows),
                "rows": [row.to_dict() for row in rows],
            }
            path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(markdown(rows))
    missed = missed_bars(rows)
    print("\n".join(missed) or "All bars are met.", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
