"""What `fdq demo` and the README's table are made of: that it is told how far it is."""

import math
import types

import numpy as np
import pytest

from fdq.analysis import conversion_cost
from fdq.analysis.comparison import Comparison
from fdq.models import CONFIGS, abstract
from fdq.quantizers.quantization import match_table
from fdq.schemes.scheme import Scheme


def test_who_waits_hears_every_share_of_the_work_up_to_all_of_it(tmp_path, monkeypatch):
    told = []
    comparison = Comparison(
        source=tmp_path, tokenizer=None, tokens=np.arange(4), text_bytes=9, text_sha256="",
        is_reference_text=False, prompt="",
    )  # fmt: skip
    replaced = {
        "fdq.storage.load": lambda *a, **k: None,
        "fdq_checkpoints.inspect": lambda *a: types.SimpleNamespace(disk_bytes=5),
        "fdq.analysis.comparison.record_logits": lambda *a, **k: None,
    }

    def converted(*args, progress, **kwargs):
        for done in range(5):
            progress(done, 4, "layers")
        return types.SimpleNamespace(disk_bytes=5)

    def evaluated(*args, progress, **kwargs):
        progress(1, 2)
        progress(2, 2)

    replaced |= {"fdq_checkpoints.convert": converted}
    replaced |= {"fdq.analysis.comparison.evaluate": evaluated}
    for name, function in replaced.items():
        monkeypatch.setattr(name, function)
    monkeypatch.setattr(Comparison, "_decode", lambda self, model: "text")
    comparison.original(lambda share, note: told.append((share, note)))
    comparison.measure("W8A16", tmp_path, progress=lambda s, n: told.append((1 + s, n)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[0] == 0 and shares[-1] == 2 and 1 in shares
    assert len(set(shares)) > 10
    assert {note for _, note in told} >= {"loading", "converting", "evaluating", "decoding"}


TABLES = {
    scheme: match_table(abstract(CONFIGS["ernie-4.5-0.3b"]), scheme) for scheme in ("W8A16", "W4")
}


def test_the_cost_of_a_conversion_is_that_of_its_weights(monkeypatch):
    asked = []

    def seconds_a_weight(spec, quantizer, k):
        asked.append((str(Scheme(weight=spec)), quantizer))
        return {"search": 7e-9, "absmax": 1e-9}[quantizer]

    monkeypatch.setattr(conversion_cost, "seconds_a_weight", seconds_a_weight)
    weights = sum(math.prod(row.shape) for row in TABLES["W4"].quantized)
    searched = conversion_cost.cost_of(TABLES["W4"])
    assert searched.weights == weights > 100e6
    assert searched.seconds == pytest.approx(7e-9 * weights)
    assert (searched.quantizers, searched.has_faster) == (("search",), True)
    fast = conversion_cost.cost_of(TABLES["W4"], method="absmax")
    assert (fast.seconds, fast.has_faster) == (pytest.approx(1e-9 * weights), False)
    by_default = conversion_cost.cost_of(TABLES["W8A16"])
    assert (by_default.quantizers, by_default.has_faster) == (("absmax",), False)
    assert asked == [("W4A16C16", "search"), ("W4A16C16", "absmax"), ("W8A16C16", "absmax")]


def test_few_weights_are_not_timed(monkeypatch):
    monkeypatch.setattr(conversion_cost, "FEW_WEIGHTS", 10**12)
    assert conversion_cost.cost_of(TABLES["W4"]) is None


def test_a_sample_is_timed_here():
    spec = Scheme.parse("W8").weight
    assert 0 < conversion_cost.seconds_a_weight(spec, "absmax", 1024) < 1e-5


def test_a_directory_without_shapes_has_no_cost(tmp_path):
    assert conversion_cost.conversion_cost(tmp_path, "W4") is None
