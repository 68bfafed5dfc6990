"""Squared error of every weight format, beside what information theory allows.

    python -m benchmarks.distortion
    python -m benchmarks.distortion --rows 256 --distribution normal --json distortion.json

For each format and method: stored bits per weight (everything counted), the relative squared error
|w - w'|^2 / |w|^2 measured on independent N(0, 1), Laplace and Student-t(5) weights, its analytic
figure for N(0, 1) ("~" where that is a simulation), the rate-distortion bound 2^(-2 R) of a normal
source at the same bits, and the distance to that bound; of the other two sources the distance is to
Shannon's lower bound, which is that of a normal source times 0.8653 and 0.9106. ``ref`` is how far
the measured figures are from those of an independent NumPy implementation at the default sizes
(negative is better).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.figure import dot_chart
from fdq.formats import FORMATS
from fdq.formats.qtensor import dequantize
from fdq.quantizers import expected_distortion, quantize_array
from fdq.schemes.scheme import WeightSpec
from fdq.text_table import aligned

SEED = 20260101
ENTROPY_POWERS = {"normal": 1.0, "laplace": math.e / math.pi, "student-t": 0.9106}
"""By source the variance of normal numbers of the same entropy, of a variance of 1."""
REFERENCE_COLUMNS = 4096


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: what is printed.
      spec: how the weight is stored.
      method: how scales are chosen.
      normal, student_t: relative squared errors of the independent implementation, 1024 outputs of
        4096 inputs; None where it has no such figure.
      note: where the two differ on purpose.
    """

    name: str
    spec: WeightSpec
    method: str
    normal: float | None = None
    student_t: float | None = None
    note: str = ""


def _group(format: Any, size: int, dtype: str = "bfloat16", **fields: Any) -> WeightSpec:
    return WeightSpec(
        format=format, granularity="group", group_size=size, scale_dtype=dtype, **fields
    )


_BLOCK = WeightSpec(format="float8_e4m3", granularity="block", block_size=(128, 128))
_MX = "float8_e8m0fnu"
_NV = "float8_e4m3fn"

ROWS = (
    Row("INT8 channel", WeightSpec(format="int8"), "absmax", 7.5e-5, 3.95e-4),
    Row("INT8 g128", _group("int8", 128), "absmax", 4.2e-5, 9.1e-5),
    Row("FP8 E4M3 channel", WeightSpec(format="float8_e4m3"), "absmax", 7.00e-4, 6.89e-4),
    Row("FP8 E4M3 128x128", _BLOCK, "absmax", 7.00e-4, 6.97e-4),
    Row(
        "FP8 E4M3 128x128 UE8M0",
        dataclasses.replace(_BLOCK, scale_dtype=_MX),
        "absmax",
        7.05e-4,
        7.01e-4,
    ),
    Row("FP8 E5M2 channel", WeightSpec(format="float8_e5m2"), "absmax"),
    Row("MXFP8 g32", _group("mxfp8", 32, _MX), "absmax", 8.63e-4, 9.87e-4),
    Row("MXFP8 g32", _group("mxfp8", 32, _MX), "search"),
    Row("INT4 channel", WeightSpec(format="int4"), "absmax", 0.024730, 0.123784),
    Row(
        "INT4 channel",
        WeightSpec(format="int4"),
        "search",
        0.012822,
        0.037465,
        "the reference has no code -8 here",
    ),
    Row("INT4 g128", _group("int4", 128), "absmax", 0.013746, 0.029709),
    Row("INT4 g128", _group("int4", 128), "signed_max", 0.010620, 0.022891),
    Row("INT4 g128", _group("int4", 128), "search", 0.009293, 0.019646),
    Row("INT4 g64", _group("int4", 64), "search", 0.008041, 0.014875),
    Row("INT4 g32", _group("int4", 32), "absmax", 0.009411, 0.015008),
    Row("INT4 g32", _group("int4", 32), "search", 0.006533, 0.010605),
    Row(
        "INT4 g128 asymmetric",
        _group("int4", 128, zero_point="integer"),
        "absmax",
        0.010086,
        0.017841,
    ),
    Row(
        "INT4 g128 asymmetric",
        _group("int4", 128, zero_point="integer"),
        "search",
        0.008990,
        0.016074,
    ),
    Row("INT4 g64 affine", _group("int4", 64, zero_point="offset"), "absmax"),
    Row("INT4 g64 affine", _group("int4", 64, zero_point="offset"), "search"),
    Row("NF4 g64", _group("nf4", 64), "absmax", 0.008469, 0.010981),
    Row(
        "NF4 g64 double quantized",
        _group("nf4", 64, double_quantization=True),
        "absmax",
        0.008469,
        0.010984,
    ),
    Row("NF4 g64", _group("nf4", 64), "search", 0.006850, 0.009250),
    Row("MXFP4 g32", _group("mxfp4", 32, _MX), "absmax", 0.013212, 0.015891),
    Row("MXFP4 g32", _group("mxfp4", 32, _MX), "search", 0.012436, 0.014995),
    Row("NVFP4 g16", _group("nvfp4", 16, _NV), "absmax", 0.009042, 0.008517),
    Row("NVFP4 g16", _group("nvfp4", 16, _NV), "four_over_six", 0.007556, 0.007512),
    Row("NVFP4 g16", _group("nvfp4", 16, _NV), "search", 0.006592, 0.006740),
    Row("INT3 g128", _group("int3", 128), "absmax", 0.074898, 0.149672),
    Row("INT3 g128", _group("int3", 128), "search", 0.034421, 0.062828),
    Row(
        "INT3 g128 asymmetric",
        _group("int3", 128, zero_point="integer"),
        "absmax",
        0.046354,
        0.080822,
    ),
    Row(
        "INT3 g128 asymmetric",
        _group("int3", 128, zero_point="integer"),
        "search",
        0.034679,
        0.059344,
    ),
    Row("INT2 g128", _group("int2", 128), "absmax", 0.586952, 0.647124),
    Row("INT2 g128", _group("int2", 128), "search", 0.131873, 0.182793),
    Row("INT2 g128 half", _group("int2", 128, zero_point="half"), "search", 0.115873, 0.185125),
    Row(
        "INT2 g128 asymmetric",
        _group("int2", 128, zero_point="integer"),
        "absmax",
        0.252496,
        0.357230,
    ),
    Row(
        "INT2 g128 asymmetric",
        _group("int2", 128, zero_point="integer"),
        "search",
        0.135535,
        0.185729,
    ),
    Row("CC2 (WINT2) g64", _group("cc2", 64, "uint4"), "search", 0.10423, 0.154),
)


def sample(distribution: str, rows: int, columns: int) -> jax.Array:
    """float32 weights ``[K = columns, N = rows]``: groups run along the columns of the sample."""
    rng = np.random.default_rng(SEED)
    if distribution == "normal":
        w = rng.standard_normal((rows, columns), np.float32)
    elif distribution == "laplace":
        w = rng.laplace(size=(rows, columns)).astype(np.float32)
    else:
        w = rng.standard_t(5, (rows, columns)).astype(np.float32)
    return jnp.asarray(np.ascontiguousarray(w.T))


def relative_squared_error(w: jax.Array, spec: WeightSpec, method: str | None) -> float:
    """|w - w'|^2 / |w|^2, accumulated in float64."""
    decoded = np.asarray(dequantize(quantize_array(w, spec, method=method)))
    original = np.asarray(w)
    difference = (original - decoded).astype(np.float64)
    norm = float(np.vdot(original, original.astype(np.float64)))
    assert norm > 0, "the sample is zero"
    return float(np.vdot(difference, difference)) / norm


def measure(row: Row, weights: dict[str, jax.Array]) -> dict[str, Any]:
    """The figures of one line, as printed and as written to JSON."""
    format = FORMATS[row.spec.format]
    shape = next(iter(weights.values())).shape
    analytic = expected_distortion(row.spec, row.method, k=shape[0])
    rate = format.bits_per_weight(row.spec, shape)
    result: dict[str, Any] = {
        "name": row.name,
        "scheme": str(row.spec),
        "method": row.method,
        "bits_per_weight": rate,
        "bound": 2.0 ** (-2 * rate),
        "analytic": analytic.value,
        "analytic_kind": analytic.kind,
        "note": row.note,
    }
    for distribution, w in weights.items():
        error = relative_squared_error(w, row.spec, row.method)
        reference = {"normal": row.normal, "student-t": row.student_t}.get(distribution)
        if row.spec.granularity == "channel" and row.spec.format.startswith("int"):
            # The largest weight of a channel, and so the error, grows with the channel's length.
            reference = reference if w.shape[0] == REFERENCE_COLUMNS else None
        result[distribution] = {
            "relative_squared_error": error,
            "sqnr_db": -10 * math.log10(error),
            "gap_db": 10 * math.log10(error / (ENTROPY_POWERS[distribution] * result["bound"])),
            "reference": reference,
            "over_reference": None if reference is None else error / reference - 1,
        }
    if "normal" in result:
        result["gap_db"] = result["normal"]["gap_db"]
    return result


COLUMNS = ("format", "method", "bpw", "N(0,1)", "dB", "ref", "analytic", "2^-2R", "gap dB")
COLUMNS += ("Laplace", "dB", "gap dB", "t(5)", "dB", "gap dB", "ref", "")


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """One line of the printed table."""

    def measured(distribution: str) -> tuple[str, str, str, str]:
        found = result.get(distribution)
        if found is None:
            return "", "", "", ""
        over, error = found["over_reference"], found["relative_squared_error"]
        reference = "" if over is None else f"{over:+.1%}"
        return f"{error:.4g}", f"{found['sqnr_db']:.2f}", f"{found['gap_db']:.2f}", reference

    error, decibels, gap, reference = measured("normal")
    mark = "~" if result["analytic_kind"] == "simulated" else ""
    return (
        result["name"],
        result["method"],
        f"{result['bits_per_weight']:.3f}",
        error,
        decibels,
        reference,
        f"{mark}{result['analytic']:.4g}",
        f"{result['bound']:.3g}",
        gap,
        *measured("laplace")[:3],
        *measured("student-t"),
        result["note"],
    )


def plot(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Distance to the bound of a normal source, one line a format, from many bits to few."""
    results = sorted(results, key=lambda result: result["bits_per_weight"], reverse=True)
    labels = [f"{r['name']}, {r['method']} ({r['bits_per_weight']:.3f} bits)" for r in results]
    figure, axes = dot_chart(labels, "squared error over the rate-distortion bound 2^(-2R), dB")
    for distribution, name, marker, color in (
        ("normal", "N(0, 1)", "o", "C0"),
        ("student-t", "Student-t(5)", "x", "C1"),
    ):
        shown = [(y, r) for y, r in enumerate(results) if distribution in r]
        gaps = [
            10 * math.log10(r[distribution]["relative_squared_error"] / r["bound"])
            for _, r in shown
        ]
        if shown:
            axes.plot(gaps, [y for y, _ in shown], marker, color=color, markersize=5, label=name)
    axes.legend(title="weights", fontsize=8, title_fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """The command line; returns the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distortion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rows", type=int, default=1024, help="output channels of the sample (1024)"
    )
    parser.add_argument(
        "--cols",
        type=int,
        default=REFERENCE_COLUMNS,
        help=f"input channels, a multiple of 128 ({REFERENCE_COLUMNS})",
    )
    parser.add_argument(
        "--distribution", choices=tuple(ENTROPY_POWERS), help="one of the three (default: all)"
    )
    parser.add_argument(
        "--match", metavar="TEXT", default="", help="only rows whose name contains this text"
    )
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the figures here")
    parser.add_argument(
        "--plot", metavar="FILE", type=pathlib.Path, help="draw the distances to the bound"
    )
    options = parser.parse_args(arguments)
    if options.rows < 1 or options.cols < 128 or options.cols % 128:
        parser.error(f"--cols must be a multiple of 128 and --rows positive, got {options}")
    rows = [row for row in ROWS if options.match.lower() in row.name.lower()]
    if not rows:
        parser.error(f"no format matches {options.match!r}")
    names = (options.distribution,) if options.distribution else tuple(ENTROPY_POWERS)
    weights = {name: sample(name, options.rows, options.cols) for name in names}
    print(f"{options.rows} output channels of {options.cols} weights, seed {SEED}")
    start = time.perf_counter()
    results = []
    for row in rows:
        results.append(measure(row, weights))
        print(row.name, file=sys.stderr, flush=True)
    table = [COLUMNS, *map(cells, results)]
    print(aligned(table, right=range(2, len(COLUMNS) - 1)))
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s (~ marks simulated figures)")
    if options.json:
        about = {"rows": options.rows, "cols": options.cols, "seed": SEED, "jax": jax.__version__}
        options.json.write_text(json.dumps({**about, "results": results}, indent=1))
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
