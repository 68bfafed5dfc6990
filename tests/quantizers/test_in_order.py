"""Layers calibrated on the quantized ones before them: as by statistics of a half-made model."""

import functools

import jax
import numpy as np
import pytest

import fdq
from fdq.formats.qtensor import materialize
from tests.checkpoints import builders


@functools.cache
def model():
    return fdq.load(builders.MODELS / "ernie4_5_moe", dtype="float32")


def codes(layer):
    return {
        name: np.asarray(materialize(getattr(part, name).kernel).codes)
        for part, names in ((layer.self_attn, ("qkv_proj", "o_proj")),)
        for name in names
    }


@pytest.mark.slow
@pytest.mark.longest
def test_each_layer_sees_the_quantized_ones_before_it(rng):
    tokens = rng.integers(model().config.vocab_size, size=(6, 32))
    with pytest.warns(UserWarning, match="few tokens picked experts .*borrow from their layer"):
        found = fdq.quantize_in_order(model(), "W4A16-g16", tokens, method="gptq")
    assert found.scheme == "W4A16C16-g16"
    # The first layer by statistics of the original, which are those of its prefix.
    half = fdq.quantize(
        model(), {"layers.0": "W4A16-g16"}, method="gptq", calibration=seen(model(), tokens)
    )
    whole = fdq.quantize(model(), "W4A16-g16", method="gptq", calibration=seen(half, tokens))
    for name, expected in codes(whole.layers[1]).items():
        same = np.mean(codes(found.layers[1])[name] == expected)
        assert same > 0.995, name
    before = fdq.quantize(model(), "W4A16-g16", method="gptq", calibration=seen(model(), tokens))
    assert any(
        np.mean(codes(found.layers[1])[name] == other) < 0.995
        for name, other in codes(before.layers[1]).items()
    )


def seen(one, tokens):
    return fdq.calibrate(one, tokens, moments=True)


def test_wrong_input_is_told(rng):
    tokens = rng.integers(10, size=(4, 32))
    for problem, arguments in {
        "too few for statistics": (model(), "W4A16-g16", tokens[:1, :8]),
        "tokens range over": (model(), "W4A16-g16", tokens + 10**6),
        r"expected tokens \[N, L\]": (model(), "W4A16-g16", tokens[0]),
    }.items():
        with pytest.raises(ValueError, match=problem):
            fdq.quantize_in_order(*arguments)
    with pytest.raises(ValueError, match="moments of outputs"):
        fdq.quantize_in_order(model(), "W4A16-g16", tokens, method="gptq2")
    with pytest.raises(TypeError, match="expected a model of fdq.models"):
        fdq.quantize_in_order(jax.numpy.ones(3), "W4A16", tokens)
