"""Scales that were calibrated, of the KV cache and of activations, survive a checkpoint."""

import jax
import numpy as np
import pytest

import fdq
from fdq_checkpoints import inspect, load
from tests.checkpoints import builders
from tests.checkpoints.test_stored_trees import assert_same

# Scheme, and the ends of the paths of what a checkpoint holds for it beside the weights.
SCHEMES = {
    "W16A16C8-kvchannel": {"k_cache_scale", "v_cache_scale"},
    "W16A16C4-kvchannel": {"k_cache_scale", "k_cache_zero", "v_cache_scale", "v_cache_zero"},
    "W16A16C4-kvcentered": {"k_cache_mean"},
    "tensor_wise_fp8": {"activation_scale"},
}


@pytest.fixture(scope="module")
def floats():
    return load(builders.MODELS / "ernie4_5_moe")


@pytest.fixture(scope="module")
def calibration(floats):
    tokens = np.random.default_rng(0).integers(0, floats.config.vocab_size, (2, 16))
    return fdq.calibrate(floats, tokens)


def generated(model):
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    return fdq.generate(model, prompts, max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_calibrated_scales_are_saved_and_restored(tmp_path, floats, calibration, scheme):
    model = fdq.quantize(floats, scheme, calibration=calibration)
    fdq.save(model, tmp_path / "saved")
    names = {row.path.rsplit(".", 1)[-1] for row in inspect(tmp_path / "saved", verify=True).rows}
    static = {name for name in names if name.startswith(("k_cache", "v_cache", "activation"))}
    assert static == SCHEMES[scheme]
    restored = load(tmp_path / "saved")
    assert_same(model, restored)
    assert restored.scheme == model.scheme and restored.recipe_record == model.recipe_record
    cache, expected = (m.init_cache(1, 16) for m in (restored, model))
    assert cache.layers[0].k.spec == expected.layers[0].k.spec
    jax.tree.map(np.testing.assert_array_equal, cache, expected)
    assert generated(restored) == generated(model)
