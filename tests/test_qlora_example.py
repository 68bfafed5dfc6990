"""The example that trains adapters beside 2-bit weights."""

import json

import jax
import numpy as np
import pytest

import fdq
from examples import qlora
from fdq.analysis.shipped_model import shipped_model_path


@pytest.mark.slow
def test_a_short_run_writes_its_curve_and_adapters(tmp_path):
    name = tmp_path / "run"
    settings = {"steps": 4, "every": 2, "batch": 2, "length": 16, "heldout-bytes": 900}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have
        result = qlora.main([*arguments, "--targets=self_attn", f"--out={name}"])
    assert json.loads(name.with_suffix(".json").read_text())["losses"] == result["losses"]
    assert name.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in result["curve"]] == [0, 2, 4]
    assert np.isfinite(result["losses"]).all()
    assert result["original_bits_per_byte"] < result["quantized_bits_per_byte"]
    fdq.load_lora(fdq.load(shipped_model_path()), f"{name}-adapters")
