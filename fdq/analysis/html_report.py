"""One HTML file about a quantized model beside its original: no scripts, nothing from elsewhere.

Colors follow the reader's, light or dark, in text and in the inline SVG.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fdq.analysis import chart
from fdq.analysis.evaluation import Report
from fdq.analysis.layer_errors import LayerError
from fdq.analysis.planner import WeightTable

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#24292f;--dim:#57606a;--grid:#d0d7de}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--dim:#9198a1;--grid:#3d444d}}
body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--grid);text-align:right}
th:first-child,td:first-child{text-align:left}td{white-space:nowrap}th{color:var(--dim);font-weight:600}
.scroll{overflow-x:auto}.note{color:var(--dim);font-size:.9em}svg{max-width:100%;height:auto}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a report is about.

    Attributes:
      name: of the checkpoint.
      scheme: its scheme, or None.
      original: name of the original, or None.
      text: which text, in words.
      facts: (name, value) of anything else that is worth a line: versions, how it was made.
    """

    name: str
    scheme: str | None
    original: str | None
    text: str
    facts: Sequence[tuple[str, str]] = ()


def page(
    subject: Subject,
    report: Report,
    weights: WeightTable,
    *,
    original: WeightTable | None = None,
    layers: Sequence[LayerError] = (),
    beside: Mapping[str, Report] | None = None,
) -> str:
    """The report as a whole HTML document.

    Args:
      subject: names and what was done.
      report: what `fdq.evaluate` measured of the model.
      weights: its weights, of `fdq.analysis.planner.weight_table`.
      original: those of the original.
      layers: what each layer lost.
      beside: other schemes of the same original, measured on the same text, by name.
    """
    title = f"{subject.name}: {subject.scheme or 'not quantized'}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        _note(f"Text: {subject.text}; {report.tokens:,} tokens scored."),
        "<h2>Quality</h2>",
        _table(("", "this model", "original"), _quality(report)),
        _note(_window(report)),
    ]
    if report.kl_nats_per_token is not None:
        parts += ["<h2>Size against loss</h2>", *_pareto(subject, report, beside or {})]
    parts += ["<h2>Memory</h2>", _table(*_memory(report, weights, original))]
    if layers:
        parts += _layers(layers)
    if subject.facts:
        parts += ["<h2>How it was made</h2>", _table(("", ""), subject.facts)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _quality(report: Report) -> list[tuple[str, ...]]:
    nats = report.reference_nats_per_token
    compared = report.kl_nats_per_token is not None
    rows = [
        ("bits per byte", report.bits_per_byte, report.reference_bits_per_byte, ".4f"),
        ("perplexity", report.perplexity, None if nats is None else math.exp(nats), ".3f"),
        ("nats per token", report.nats_per_token, nats, ".4f"),
        ("KL to the original, nats per token", report.kl_nats_per_token, 0.0, ".5f"),
        ("same most likely token", report.top1_agreement, 1.0, ".2%"),
    ]
    return [
        (name, format(mine, spec), format(theirs, spec) if compared and theirs is not None else "—")
        for name, mine, theirs, spec in rows
        if mine is not None
    ]


def _window(report: Report) -> str:
    if report.window is None or report.stride is None:
        return ""
    least = report.window - report.stride
    context = f"at least {least} tokens of context" if least else "windows side by side"
    cache = f" Attention through a {report.cache} cache." if report.cache else ""
    return (
        f"Windows of {report.window} tokens, stride {report.stride}: {context}. Published "
        "perplexities mostly come from windows of 2,048 with as large a stride: --window 2048 "
        f"--stride 2048, on their text.{cache}"
    )


def _pareto(subject: Subject, report: Report, beside: Mapping[str, Report]) -> list[str]:
    def point(name: str, one: Report) -> tuple[str, float, float]:
        bits = one.quantized_bits_per_weight or one.bits_per_weight or 16.0
        return name, bits, one.kl_nats_per_token or 0.0

    groups = {"this model": [point(subject.scheme or subject.name, report)]}
    if beside:
        groups["other schemes"] = [point(name, one) for name, one in beside.items()]
    rows = [
        (name, f"{bits:.3f}", f"{kl:.5f}")
        for members in groups.values()
        for name, bits, kl in sorted(members, key=lambda p: p[1])
    ]
    svg = chart.points(
        groups,
        x="bits per quantized weight, scales included",
        y="KL to the original, nats per token",
        log_y=True,
    )
    return [svg, _table(("scheme", "bits per weight", "KL"), rows)]


def _memory(
    report: Report, weights: WeightTable, original: WeightTable | None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    before = {} if original is None else original.by_kind()
    rows = [
        (
            kind,
            f"{sum(e.parameters for e in entries):,}",
            f"{sum(e.bytes for e in entries):,}",
            f"{sum(e.bytes for e in before[kind]):,}" if kind in before else "—",
            ", ".join(sorted({e.format for e in entries})),
        )
        for kind, entries in weights.by_kind().items()
    ]
    whole = "—" if original is None else f"{original.bytes:,}"
    bits = weights.bits_per_weight
    said = "" if bits is None else f"{bits:.3f} bits per weight"
    rows.append(("all weights", f"{weights.parameters:,}", f"{weights.bytes:,}", whole, said))
    if report.cache_bytes_per_token is not None:
        cached = f"{report.cache_bytes_per_token:,.0f}"
        rows.append(("cache, per token", "", cached, "", report.cache or ""))
    return ("", "parameters", "bytes", "original", "stored as"), rows


def _layers(layers: Sequence[LayerError]) -> list[str]:
    def decibels(number: float | None) -> str:
        return "—" if number is None else f"{number:.1f}"

    rows = [
        (
            layer.path.removesuffix(".kernel"),
            layer.format,
            f"{layer.bits_per_weight:.3f}",
            decibels(layer.weight_sqnr),
            decibels(layer.output_sqnr),
            f"{layer.weight_outlier:.1f}",
            "—" if layer.input_outlier is None else f"{layer.input_outlier:.1f}",
            "—" if layer.outlier_channels is None else str(layer.outlier_channels),
        )
        for layer in layers
    ]
    heading = ("layer", "format", "bits", "weights, dB", "outputs, dB")
    heading += ("largest weight", "largest input", "outlier channels")
    finite = [
        (layer.path.removesuffix(".kernel"), layer.output_sqnr, layer.format)
        for layer in layers
        if layer.output_sqnr is not None and math.isfinite(layer.output_sqnr)
    ]
    parts = ["<h2>Layers</h2>"]
    if finite:
        parts.append(chart.bars(finite, x="signal to quantization noise of outputs, dB"))
    starved = [f"{layer.path} ({layer.starved})" for layer in layers if layer.starved]
    parts += [
        f'<div class="scroll">{_table(heading, rows)}</div>',
        _note(
            "dB: energy of the original over that of the change; outputs for the inputs that the "
            "original has. Largest: over the root mean square of all. Outlier channels: inputs "
            "above 6 of them."
        ),
    ]
    if starved:
        parts.append(_note(f"Few tokens of this text picked experts of {', '.join(starved)}."))
    return parts


def _text(value: Any) -> str:
    return html.escape(str(value))


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heading) if any(heading) else ""
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n{f'<tr>{head}</tr>' if head else ''}\n{body}\n</table>"
