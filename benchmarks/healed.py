"""What healing makes of the shipped model: `python -m benchmarks.healed`.

Each row quantizes with second moments of 98,304 tokens, heals on the training split of the sample
text, and predicts held-out text through the cache, as `benchmarks.calibrated`. Prints a table and
exits with 1 if a bar is missed. A stopped run goes on from the states in --folder.

    python -m benchmarks.healed --row W2A16:gptq2:free --calibration statistics.npz
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import fdq
from benchmarks.calibrated import MOMENT_ROWS
from fdq import text_table
from fdq.analysis import sample_text
from fdq.analysis.comparison import Comparison
from fdq.calibration.statistics import Calibration

ROWS = {
    "WT2A16:ldlq2:fixed": 0.045,
    "W2A16:gptq2:fixed": None,
    "W2A16:gptq2:free": 0.075,
    "WT3A16:ldlq2:fixed": 0.011,
}
"""Scheme, quantizer and codes, and how large the KL in nats per token may be."""

TEXT_ROWS = 1713


def main() -> int:
    """Measures the rows that were asked for; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.healed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--row", metavar="SCHEME:METHOD:CODES", action="append", help="(all)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="rows of 256 tokens a step (8)")
    parser.add_argument("--tune", default="scales,norms,routers,biases")
    parser.add_argument("--bytes", type=int, default=65_536, help="of held-out text (65536)")
    parser.add_argument(
        "--calibration", metavar="FILE", type=pathlib.Path, help="statistics, read or else written"
    )
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("healed"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    comparison = Comparison.of_shipped_model(text_bytes=arguments.bytes, prompt="import os\n")
    if arguments.calibration is not None and arguments.calibration.exists():
        calibration = Calibration.load(arguments.calibration)
    else:
        calibration = comparison.calibration(moments=True, output_moments=True, rows=MOMENT_ROWS)
        if arguments.calibration is not None:
            calibration.save(arguments.calibration)
    original = fdq.load(comparison.source, prepare=False)
    rows = sample_text.calibration_rows(
        lambda text: comparison.tokenizer.encode(text, bos=True), TEXT_ROWS
    )
    cells, missed = [], []
    for name in arguments.row or ROWS:
        scheme, method, codes = name.split(":")
        stem = arguments.folder / name.replace(":", "-")
        model = fdq.quantize(original, scheme, method=method, calibration=calibration)
        healed = fdq.heal(
            model,
            original,
            rows,
            steps=arguments.steps,
            batch_size=arguments.batch,
            tuned=arguments.tune.split(","),
            codes=codes,  # pyright: ignore[reportArgumentType]
            state=f"{stem}.npz",
            progress=lambda done, steps, note: print(f"{done}/{steps} {note}", file=sys.stderr),
        )
        healed.plot(f"{stem}.svg")
        report, before = (
            fdq.evaluate(
                one,
                comparison.tokens,
                reference=original,
                text_bytes=comparison.text_bytes,
                through_cache=True,
            )
            for one in (healed.model, model)
        )
        result = healed.to_dict() | {"report": report.to_dict(), "unhealed": before.to_dict()}
        pathlib.Path(f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        bar, kl = ROWS.get(name), report.kl_nats_per_token
        assert kl is not None
        if bar is not None and not kl <= bar:  # which NaN is not, either
            missed.append(f"{name}: {kl:.5f} nats per token, the bar is {bar}")
        shown = (f"{before.kl_nats_per_token:.5f}", f"{kl:.5f}", "—" if bar is None else f"{bar}")
        cells.append((scheme, method, codes, *shown, f"{report.top1_agreement:.2%}"))
    columns = ("scheme", "quantizer", "codes", "KL before", "KL healed", "bar", "same top token")
    print(text_table.markdown(columns, cells))
    print("\n".join(missed) or "All bars are met.", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
