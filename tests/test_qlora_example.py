"""The example that trains adapters beside 2-bit weights."""

import json

import jax
import numpy as np
import pytest

import fdq
from docs.import_graph import ROOT
from examples import qlora
from fdq.analysis.shipped_model import shipped_model_path


def test_the_picture_of_the_site_is_that_of_its_figures():
    figures = json.loads((ROOT / "docs" / "qlora.json").read_text("utf-8"))
    drawn = (ROOT / "docs" / "qlora.svg").read_text("utf-8")
    assert drawn == qlora.drawing(figures), "run python examples/qlora.py --draw docs/qlora.json"
    lost = figures["quantized_bits_per_byte"] - figures["original_bits_per_byte"]
    won = figures["quantized_bits_per_byte"] - figures["tuned_bits_per_byte"]
    assert f"win back {won / lost:.0%}".replace("%", " %") in (
        ROOT / "docs" / "fine_tuning.md"
    ).read_text("utf-8")


@pytest.mark.slow
def test_a_short_run_writes_its_curve_and_adapters(tmp_path):
    name = tmp_path / "run"
    settings = {"steps": 4, "every": 2, "batch": 2, "length": 16, "heldout-bytes": 900}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have
        result = qlora.main([*arguments, "--targets=self_attn", f"--out={name}"])
    assert json.loads(name.with_suffix(".json").read_text())["losses"] == result["losses"]
    drawn = name.with_suffix(".svg").read_text("utf-8")
    assert drawn.count("<polyline") == 3 and f": {result['tuned_bits_per_byte']:.3f}" in drawn
    assert [step for step, _ in result["curve"]] == [0, 2, 4]
    assert np.isfinite(result["losses"]).all()
    assert result["original_bits_per_byte"] < result["quantized_bits_per_byte"]
    fdq.load_lora(fdq.load(shipped_model_path()), f"{name}-adapters")
