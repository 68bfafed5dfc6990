"""SmoothQuant, AWQ and rotation: the same function, with weights and activations that quantize."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import fdq
import fdq_checkpoints
from fdq import nn
from fdq.analysis.layer_errors import layer_errors
from fdq.models.config import DecoderConfig
from fdq.models.decoder import Decoder
from fdq.models.granite import ScaledResidual
from fdq.models.parts import DecoderLayer, MoEConfig, Sandwich
from fdq.quantizers.channel_scales import Scaling, joints
from fdq.quantizers.preparation import check_preparations, prepared
from fdq.quantizers.rotated import Rotation, tell
from tests.covering import longest

CONFIG = DecoderConfig(
    model_type="toy",
    vocab_size=64,
    hidden_size=48,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_epsilon=1e-6,
    rotary=nn.RotaryConfig(interleaved=True),
    tie_word_embeddings=True,
    qkv_bias=True,
    output_bias=True,
    moe=MoEConfig(
        num_experts=3, top_k=2, intermediate_size=24, layers=(1,), shared_intermediate_size=32
    ),
    dtype="float32",
)
FACTOR = 32.0
ATTENTION = (("qkv_proj", 48), ("o_proj", 64))
EXPERTS = (
    ("experts.gate_up_proj", 48),
    ("experts.down_proj", 24),
    ("shared_experts.gate_up_proj", 48),
    ("shared_experts.down_proj", 32),
)


HALVES = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class Foreign(DecoderLayer):
    """A layer of somebody else, which may do anything."""


class OtherMLP(nn.MLP):
    """Likewise."""


def randomized(model, rng):
    """Norms and biases that are not all alike."""
    state = nnx.state(model)

    def change(path, a):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if "scale" in names:
            return (1 + 0.3 * rng.standard_normal(a.shape)).astype(np.float32)
        return (0.1 * rng.standard_normal(a.shape)).astype(np.float32) if "bias" in names else a

    nnx.update(model, jax.tree_util.tree_map_with_path(change, state))
    return model


@pytest.fixture
def tokens(rng):
    return rng.integers(0, 64, (8, 16))


@pytest.fixture
def model(rng):
    return randomized(Decoder(CONFIG, rngs=nnx.Rngs(params=0)), rng)


def planted(model, rng, calibration):
    """Outlier channels in everything that a linear layer reads."""
    scaling = Scaling(model, calibration)
    for joint in joints(model):
        scale = np.ones(joint.size, np.float32)
        scale[rng.choice(joint.size, 2, replace=False)] = 1 / FACTOR
        scaling.apply(joint, scale)
    return scaling.model, scaling.calibration()


def statistics_of_ones():
    sizes = {f"layers.{i}.self_attn.{name}": size for i in (0, 1) for name, size in ATTENTION}
    sizes |= {
        f"layers.0.mlp.{name}": size for name, size in (("gate_up_proj", 48), ("down_proj", 40))
    }
    sizes |= {f"layers.1.mlp.{name}": size for name, size in EXPERTS}
    absmax, mean_square = (
        {f"{path}.kernel": np.ones(size, np.float32) for path, size in sizes.items()} for _ in "12"
    )
    return fdq.Calibration(absmax=absmax, mean_square=mean_square, cache=(), tokens=1)


def logits(model, tokens):
    return np.asarray(nnx.jit(lambda m, t: m(t))(model, tokens))


@pytest.mark.slow
def test_scaled_channels_are_the_same_function(model, tokens, rng):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    nothing = fdq.Calibration(absmax={}, mean_square={}, cache=(), tokens=1)
    other, _ = planted(model, rng, nothing)
    assert len(list(joints(model))) == 9
    np.testing.assert_array_equal(logits(other, tokens), logits(model, tokens))  # powers of two
    assert not np.array_equal(
        other.layers[1].mlp.router.kernel.get_value(), model.layers[1].mlp.router.kernel.get_value()
    )
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.slow
@pytest.mark.longest
def test_statistics_of_scaled_channels_are_those_that_calibration_finds(model, tokens, rng):
    seen = fdq.calibrate(model, tokens, output_moments=True)
    other, known = planted(model, rng, seen)
    expected = logits(model, tokens)
    calibrated = fdq.calibrate(other, tokens, output_moments=True)
    for name, values in calibrated.statistics.items():
        assert values.keys() == known.statistics[name].keys()
        for path, value in values.items():
            close = 1e-4 * np.abs(value).max() if name == "output_moment" else 0
            np.testing.assert_allclose(known.statistics[name][path], value, rtol=2e-5, atol=close)
    for one, two in zip(known.cache, calibrated.cache, strict=True):
        np.testing.assert_array_equal(one.v_max, two.v_max)
    smooth, of_smooth = fdq.smoothed(other, known, exact=True)
    np.testing.assert_array_equal(logits(smooth, tokens), expected)
    for path, absmax in of_smooth.absmax.items():
        assert absmax.max() / np.median(absmax) < 0.5 * known.absmax[path].max() / np.median(
            known.absmax[path]
        )
    # Scales of two layers only, by pattern.
    part, _ = fdq.smoothed(other, known, only="layers.1.self_attn.*")
    same = [
        np.array_equal(a.input_layernorm.scale.get_value(), b.input_layernorm.scale.get_value())
        for a, b in zip(part.layers, other.layers, strict=True)
    ]
    assert same == [True, False]


def error(model, other, tokens):
    return np.square(logits(model, tokens) - logits(other, tokens)).mean()


@pytest.mark.slow
@pytest.mark.longest
def test_smoothed_and_aware_models_quantize_with_less_error(model, tokens, rng):
    other, seen = planted(model, rng, fdq.calibrate(model, tokens, moments=True))
    for scheme, factor in (("W8A8", 0.25), ("W8A8-static", 0.1)):
        smooth, of_smooth = fdq.smoothed(other, seen, scheme)
        worse = error(model, fdq.quantize(other, scheme, calibration=seen), tokens)
        better = error(model, fdq.quantize(smooth, scheme, calibration=of_smooth), tokens)
        assert better < factor * worse
    scheme = "W4A16-g8"
    aware, of_aware = fdq.activation_aware(other, seen, scheme)
    np.testing.assert_allclose(logits(aware, tokens), logits(model, tokens), atol=1e-4)
    worse = error(model, fdq.quantize(other, scheme), tokens)
    better = error(model, fdq.quantize(aware, scheme, calibration=of_aware), tokens)
    assert better < 0.7 * worse


def test_dynamic_rows_are_smoothed_by_their_usual_size_static_ones_by_their_largest(model):
    path, part = "layers.0.self_attn.qkv_proj.kernel", "layers.0.self_attn.qkv_proj.*"
    w = np.asarray(model.layers[0].self_attn.qkv_proj.kernel.get_value())
    seen = statistics_of_ones()
    largest, usual = np.random.default_rng(0).uniform(1, 2, (2, 48)).astype(np.float32)
    seen.absmax[path][:], seen.mean_square[path][:] = largest, np.square(usual)
    by_usual = np.sqrt(usual / np.sqrt(np.square(w).mean(axis=1)))
    by_largest = largest**0.6 / np.abs(w).max(axis=1) ** 0.4
    mixed = fdq.Recipe([("*.down_proj", "W8A8-static"), ("*", "W8A8")])
    cases = ((None, by_usual), ("W8A8", by_usual), ("W8A8-static", by_largest), (mixed, by_usual))
    for scheme, expected in cases:
        smooth, _ = fdq.smoothed(model, seen, scheme, only=part)
        found = np.asarray(smooth.layers[0].self_attn.qkv_proj.kernel.get_value())[:, 0] / w[:, 0]
        np.testing.assert_allclose(found, expected / np.exp(np.log(expected).mean()), rtol=1e-3)


@pytest.mark.parametrize("size", [48, longest(64), longest(7)])
def test_rotations_are_orthogonal_and_spread_outliers(size):
    turn = Rotation(size, seed=3)
    matrix = np.asarray(turn(np.eye(size, dtype=np.float32)), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=2e-6)
    if size == 64:
        np.testing.assert_allclose(np.abs(matrix), 1 / 8, atol=1e-6)
    x = np.random.default_rng(0).standard_normal((5, size)).astype(np.float32)
    np.testing.assert_allclose(turn(x), x @ matrix, atol=1e-5)
    np.testing.assert_allclose(turn(x.T, axis=0), (x @ matrix).T, atol=1e-5)


def test_a_rotated_model_is_the_same_function(model, tokens):
    turned = fdq.rotated(model)
    assert turned.lm_head is not None and not turned.config.tie_word_embeddings
    assert model.lm_head is None  # its own is as it was
    assert (model.prepared, turned.prepared) == (None, "rotate")
    np.testing.assert_allclose(logits(turned, tokens), logits(model, tokens), atol=2e-4)
    kernel = turned.layers[0].self_attn.qkv_proj.kernel.get_value()
    assert not np.allclose(kernel, model.layers[0].self_attn.qkv_proj.kernel.get_value())
    assert (np.asarray(turned.norm.scale.get_value()) == 1).all()


@pytest.mark.slow
def test_what_was_done_before_goes_with_the_model_and_its_checkpoints(model, tokens, tmp_path):
    turned = fdq.rotated(model)
    tell(turned, "smooth")
    assert fdq.quantize(turned, "W8A16").prepared == "rotate,smooth"
    fdq.save(turned, tmp_path / "turned")
    assert fdq.load(tmp_path / "turned", prepare=False).prepared == "rotate,smooth"
    assert "rotate,smooth: weights were changed" in str(
        fdq_checkpoints.inspect(tmp_path / "turned")
    )
    fdq.convert(tmp_path / "turned", tmp_path / "w8", "W8A16")
    assert set(fdq_checkpoints.weight_errors(tmp_path / "w8", tmp_path / "turned"))
    fdq.save(model, tmp_path / "original")
    with pytest.raises(fdq_checkpoints.CheckpointError, match="changed before quantization .rotat"):
        fdq_checkpoints.weight_errors(tmp_path / "w8", tmp_path / "original")
    with pytest.raises(ValueError, match="layer_errors: the model's weights were changed before"):
        layer_errors(turned, model, tokens)


def test_what_cannot_be_scaled_or_turned(model, tokens):
    nothing: Any = None
    linear: Any = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="smoothed: expected an fdq.models.Decoder, found Linear"):
        fdq.smoothed(linear, nothing)
    with pytest.raises(TypeError, match="activation_aware: expected what fdq.calibrate.*NoneType"):
        fdq.activation_aware(model, nothing, "W4A16")
    seen = fdq.Calibration(absmax={}, mean_square={}, cache=(), tokens=1)
    with pytest.raises(ValueError, match=r"qkv_proj.kernel, \[48\], found nothing: .*another"):
        fdq.smoothed(model, seen)
    with pytest.raises(ValueError, match="rotated: the model is quantized"):
        fdq.rotated(fdq.quantize(model, "W8A16"))
    sandwich = Decoder(CONFIG.replace(block=Sandwich(), moe=None), rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"layers.0: a SandwichLayer with Attention cannot be"):
        fdq.rotated(sandwich)
    granite = Decoder(CONFIG.replace(block=ScaledResidual(scale=0.5)), rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"layers.0: a ScaledLayer with Attention cannot be"):
        fdq.rotated(granite)
    assert len(list(joints(granite))) == 9
    foreign = nnx.clone(model)
    foreign.layers[1] = Foreign(**{n: getattr(foreign.layers[1], n) for n in HALVES})
    with pytest.raises(ValueError, match=r"layers.1: channels of a Foreign cannot be scaled"):
        fdq.smoothed(foreign, fdq.Calibration(absmax={}, mean_square={}, cache=(), tokens=1))
    foreign = nnx.clone(model)
    mlp = foreign.layers[0].mlp
    foreign.layers[0].mlp = OtherMLP.__new__(OtherMLP)
    vars(foreign.layers[0].mlp).update(vars(mlp))
    with pytest.raises(ValueError, match=r"layers.0.mlp: a OtherMLP cannot be rotated"):
        fdq.rotated(foreign)
    assert not any(".mlp" in path for j in joints(foreign) for path in j.readers if "rs.0" in path)
    with pytest.raises(ValueError, match="odd factor 1031 is above 512"):
        Rotation(2 * 1031)
    with pytest.raises(ValueError, match="no preparation 'turn'; use one of rotate, smooth, awq"):
        check_preparations(["turn"])
    with pytest.raises(ValueError, match="smooth, rotate: expected each once, in the order of"):
        check_preparations(["smooth", "rotate"])
    with pytest.raises(ValueError, match="'smooth' needs calibration"):
        prepared(model, ["smooth"], "W8A8", None)
    seen = statistics_of_ones()
    with pytest.raises(ValueError, match="alpha from 0 to 1, found 2"):
        fdq.smoothed(model, seen, alpha=2)
    seen.mean_square["layers.0.self_attn.qkv_proj.kernel"][3] = np.inf
    with pytest.raises(ValueError, match=r"statistics of layers.0.self_attn.qkv_proj.kernel are"):
        fdq.smoothed(model, seen)
