"""What outlier channels cost 8-bit activations, and what SmoothQuant leaves of that.

    python -m benchmarks.outliers --bytes 16384

Some channels of each norm, of the values and of the linear half of each MLP are made 4 to 20 times
larger where they are written and smaller where they are read, so that the model is the same
function. Then it is quantized as it is, smoothed, and, to 4 bits, with AWQ.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

import fdq
from fdq import text_table
from fdq.analysis import sample_text
from fdq.analysis.comparison import WINDOW, Comparison
from fdq.analysis.evaluation import evaluate, record_logits
from fdq.calibration.statistics import Calibration
from fdq.models.decoder import Decoder
from fdq.quantizers.channel_scales import Scaling, joints, rounded

SHARE = 1 / 64
FACTORS = (4.0, 20.0)
BARS = {
    ("smoothed", "W8A8"): 0.0006,
    ("smoothed", "W8A8-static"): 0.002,
    ("smoothed", "W4A8:gptq"): 0.010,
}


def with_outliers(model: Decoder, seed: int = 0) -> Decoder:
    """The same function, with a few large channels in everything that a linear layer reads."""
    rng = np.random.default_rng(seed)
    nothing = Calibration(absmax={}, mean_square={}, cache=(), tokens=0)
    scaling = Scaling(model, nothing)
    for joint in joints(model):
        scale = np.ones(joint.size, np.float32)
        picked = rng.choice(joint.size, max(1, round(SHARE * joint.size)), replace=False)
        scale[picked] = 1 / np.exp(rng.uniform(np.log(FACTORS[0]), np.log(FACTORS[1]), len(picked)))
        scaling.apply(joint, rounded(scale))
    return scaling.model


def main() -> int:
    """Prints the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.outliers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bytes", type=int, default=65_536, help="of held-out text (65536)")
    parser.add_argument("--scheme", metavar="SCHEME[:METHOD]", action="append", help="(all)")
    parser.add_argument("--model", action="append", help="original, outliers, smoothed, awq (all)")
    arguments = parser.parse_args()
    comparison = Comparison.of_shipped_model(text_bytes=arguments.bytes, prompt="")
    schemes = arguments.scheme or ["W8A8", "W8A8-static", "W4A8:gptq", "W4A16"]
    original = fdq.load(comparison.source, prepare=False)
    recorded = record_logits(original, comparison.tokens, window=WINDOW)
    moments = any(":" in scheme for scheme in schemes)
    rows = sample_text.calibration_rows(
        lambda text: comparison.tokenizer.encode(text, bos=True),
        128 if moments else 32,
        length=WINDOW,
    )
    outliers = with_outliers(original)
    seen = fdq.calibrate(outliers, rows, moments=moments)
    models = {"outliers": (outliers, seen)}
    changed = {
        "smoothed": lambda scheme: fdq.smoothed(outliers, seen, scheme),
        "awq": lambda scheme: fdq.activation_aware(outliers, seen, scheme),
    }
    wanted = arguments.model or ["original", "outliers", "smoothed", "awq"]
    if "original" in wanted:
        models["original"] = (original, fdq.calibrate(original, rows, moments=moments))
    cells, missed = [], []
    for name in wanted:
        for scheme in schemes:
            bare, _, method = scheme.partition(":")
            model, known = changed[name](bare) if name in changed else models[name]
            q = fdq.quantize(model, bare, method=method or None, calibration=known)
            report = evaluate(q, comparison.tokens, reference=recorded, window=WINDOW)
            kl, bar = report.kl_nats_per_token, BARS.get((name, scheme))
            assert kl is not None
            if bar is not None and not kl <= bar:  # which NaN is not, either
                missed.append(f"{name} {scheme}: {kl:.5f} nats per token, the bar is {bar}")
            cells.append(
                (name, scheme, f"{kl:.5f}", str(bar or "—"), f"{report.top1_agreement:.2%}")
            )
            print(*cells[-1], file=sys.stderr, flush=True)
    print(text_table.markdown(("model", "scheme", "KL (nats/token)", "bar", "same top"), cells))
    print("\n".join(missed) or "All bars are met.", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
