"""The report: one file, nothing from elsewhere, the figures that were measured; and its charts."""

import html.parser
import math
import re
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq import nn
from fdq.analysis import chart, html_report
from fdq.analysis.evaluation import Report
from fdq.analysis.layer_errors import layer_errors
from fdq.analysis.planner import weight_table
from fdq.formats.qtensor import dequantize
from fdq.nn.parameters import value


class Layer(nnx.Module):
    def __init__(self):
        self.proj = nn.Linear(64, 32, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.proj(x)


class Balanced(html.parser.HTMLParser):
    """Every element is closed; no attribute loads anything."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def test_errors_of_a_layer_are_those_of_its_outputs(rng):
    x = rng.standard_normal((4, 8, 64)).astype(np.float32)
    x[..., 3] *= 30
    original = Layer()
    model = fdq.quantize(original, "W4A16-g32")
    (found,) = layer_errors(model, original, jnp.asarray(x))
    w = np.asarray(value(original.proj.kernel), np.float64)
    d = np.asarray(dequantize(value(model.proj.kernel)), np.float64) - w

    def decibels(a, b):
        return 10 * math.log10((a**2).sum() / (b**2).sum())

    assert found.weight_sqnr == pytest.approx(decibels(w, d), abs=1e-3)
    assert found.output_sqnr == pytest.approx(decibels(x @ w, x @ d), abs=1e-2)
    assert found.outlier_channels == 1
    assert found.input_outlier == pytest.approx(abs(x).max() / np.sqrt((x**2).mean()), rel=1e-4)
    with pytest.raises(ValueError, match="nothing in floats in the original"):
        layer_errors(nnx.List([model]), original, jnp.asarray(x))

    report = Report(
        tokens=10,
        nats_per_token=1.0,
        perplexity=math.e,
        kl_nats_per_token=0.0123,
        top1_agreement=0.9,
        quantized_bits_per_weight=4.5,
        reference_nats_per_token=0.5,
        window=8,
        stride=8,
    )
    subject = html_report.Subject(
        name="<model>", scheme="W4A16", original="it & co", text="a text", facts=[("fdq", "1")]
    )
    table = weight_table(model)
    page = html_report.page(
        subject,
        report,
        table,
        original=weight_table(original),
        layers=[found],
        beside={"W2A16": report},
    )
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert "<model>" not in page
    assert not re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)", page.replace("</", ""))
    assert page.count("prefers-color-scheme:dark") >= 2
    for figure in ("0.01230", "90.00%", f"{math.exp(0.5):.3f}", f"{table.bytes:,}", "windows side"):
        assert figure in page
    assert f"{found.output_sqnr:.1f}" in page


def test_charts_are_svg_with_every_point_in_view():
    drawn = chart.points(
        {"a": [("W4 <x>", 4.0, 0.01), ("W2", 2.0, 0.5)], "b": [("worse", 4.5, 0.02)]},
        x="bits",
        y="KL",
        log_y=True,
    )
    root = ElementTree.fromstring(drawn)
    tips = [e.text for e in root.iter() if e.tag.endswith("title")]
    assert tips == ["worse (b): 4.5, 0.02", "W4 <x> (a): 4, 0.01", "W2 (a): 2, 0.5"]
    for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 <= float(circle.get("cx")) <= chart.WIDTH
        assert 0 <= float(circle.get("cy")) <= chart.HEIGHT
    assert chart.pareto([(4.0, 0.01), (2.0, 0.5), (4.5, 0.02)]) == [(2.0, 0.5), (4.0, 0.01)]
    ElementTree.fromstring(chart.lines({"one": [(0, 0.0)], "two": [(0, 1.0)]}, x="", y="&"))
    for odd in (math.nan, math.inf, -math.inf):
        for picture in (
            chart.bars([("a", -1.0, "k"), ("b", odd, "l")], x="dB"),
            chart.lines({"one": [(0, 0.5), (1, odd), (2, 1.0)]}, x="", y=""),
            chart.points({"a": [("here", 1.0, 2.0), ("gone", 2.0, odd)]}, x="", y=""),
        ):
            ElementTree.fromstring(picture)
            assert not re.search(r'="[^"]*\b(nan|inf)', picture)
            assert "gone" not in picture
    ElementTree.fromstring(chart.bars([], x="dB"))
