"""Rotary positions against complex multiplication, and scalings against their papers' formulas."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from fdq.cache import CacheTensor
from fdq.nn import RotaryConfig, apply_rotary, rotary_angles
from fdq.nn.rotary import inverse_frequencies
from fdq.ops.rope_append.api import rope_append

DIM = 16


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_a_complex_product(interleaved, rng):
    config = RotaryConfig(theta=100.0, interleaved=interleaved)
    x = rng.standard_normal((2, 5, 3, DIM)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 1000]], np.int32)
    angles = rotary_angles(jnp.asarray(positions), config, DIM)
    y = np.asarray(apply_rotary(jnp.asarray(x), angles, interleaved=interleaved))
    if interleaved:
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        found = y[..., 0::2] + 1j * y[..., 1::2]
    else:
        pairs = x[..., : DIM // 2] + 1j * x[..., DIM // 2 :]
        found = y[..., : DIM // 2] + 1j * y[..., DIM // 2 :]
    turn = np.outer(positions.ravel(), 100.0 ** (-np.arange(0, DIM, 2) / DIM)).reshape(2, 5, 1, -1)
    np.testing.assert_allclose(found, pairs * np.exp(1j * turn), atol=2e-4)


def test_the_conventions_differ_by_a_permutation(rng):
    """Interleaved rotation of x is half-split rotation of the de-interleaved x: no weight moves."""
    x = jnp.asarray(rng.standard_normal((1, 4, 2, DIM)), jnp.float32)
    angles = rotary_angles(jnp.arange(4, dtype=jnp.int32)[None], RotaryConfig(), DIM)
    order = np.r_[0:DIM:2, 1:DIM:2]
    a = apply_rotary(x, angles, interleaved=True)[..., order]
    b = apply_rotary(x[..., order], angles, interleaved=False)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_linear_scaling_divides_positions():
    plain = inverse_frequencies(RotaryConfig(), DIM)
    scaled = inverse_frequencies(RotaryConfig(rope_type="linear", factor=4.0), DIM)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


def test_llama3_scaling():
    """High frequencies stay, low ones are divided, those in between are blended (2407.21783)."""
    config = RotaryConfig(
        theta=500000.0, rope_type="llama3", factor=8.0, original_max_position=8192
    )
    plain = inverse_frequencies(RotaryConfig(theta=500000.0), 128).astype(np.float64)
    scaled = inverse_frequencies(config, 128)
    wavelength = 2 * np.pi / plain
    high, low = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert high.any() and low.any() and (~high & ~low).any()
    np.testing.assert_allclose(scaled[high], plain[high], rtol=1e-6)
    np.testing.assert_allclose(scaled[low], plain[low] / 8, rtol=1e-6)
    between = ~high & ~low
    smooth = (8192 / wavelength - 1) / (4 - 1)
    blended = (1 - smooth) * plain / 8 + smooth * plain
    np.testing.assert_allclose(scaled[between], blended[between], rtol=1e-6)


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position": 4096}


def test_yarn_keeps_high_frequencies_and_divides_low_ones():
    """Those between 32 turns over the original context and 1 are blended (2309.00071)."""
    plain = inverse_frequencies(RotaryConfig(), 128).astype(np.float64)
    scaled = inverse_frequencies(RotaryConfig(**YARN), 128)
    turns = 4096 * plain / (2 * np.pi)
    high, low = turns > 40, turns < 0.8  # a channel more or less, for it rounds to whole ones
    assert high.any() and low.any() and (~high & ~low).sum() > 10
    np.testing.assert_allclose(scaled[high], plain[high], rtol=1e-6)
    np.testing.assert_allclose(scaled[low], plain[low] / 8, rtol=1e-6)
    kept = (scaled[~high & ~low] / plain[~high & ~low] - 1 / 8) / (1 - 1 / 8)
    assert (np.diff(kept) < 0).all()
    np.testing.assert_allclose(np.diff(kept, 2)[2:-2], 0, atol=1e-5)  # a straight line
    exact = inverse_frequencies(RotaryConfig(**YARN, truncate=False), 128)
    turned = np.log(4096 / (np.array([32, 1]) * 2 * np.pi))
    line = turned / np.log(10000) * 64
    keep = 1 - np.clip((np.arange(64) - line[0]) / (line[1] - line[0]), 0, 1)
    np.testing.assert_allclose(exact, plain * (keep + (1 - keep) / 8), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 0.1 * np.log(8) + 1),
        ({"attention_factor": 0.5}, 0.5),
        ({"factor": 1.0}, 1.0),
        ({"rope_type": "longrope"}, np.sqrt(1 + np.log(8) / np.log(4096))),
        ({"rope_type": "longrope", "attention_factor": 1.25}, 1.25),
        ({"rope_type": "linear", "attention_factor": 1.25}, 1.0),
    ],
)
def test_cosines_and_sines_are_scaled(changes, scale):
    config = RotaryConfig(
        **{**YARN, "short_factor": (1.0,) * 8, "long_factor": (2.0,) * 8} | changes
    )
    cos, sin = rotary_angles(jnp.arange(3, dtype=jnp.int32)[None], config, DIM)
    np.testing.assert_allclose(cos**2 + sin**2, np.full((1, 3, 8), scale**2), rtol=1e-5)


def of_two(config, positions, **options):
    """The angles of two rows of positions, by their cosines and sines."""
    cos, sin = rotary_angles(jnp.asarray(positions, jnp.int32), config, DIM, **options)
    return np.arctan2(sin, cos) / np.asarray(positions)[..., None]


def test_dynamic_frequencies_are_those_of_the_length_of_each_row():
    """theta (factor L / original - factor + 1) ^ (d / (d - 2)), as transformers writes it."""
    config = RotaryConfig(theta=1e6, rope_type="dynamic", factor=4.0, original_max_position=64)

    def wanted(length):
        grown = 4 * max(length, 64) / 64 - 3
        theta = 1e6 * grown ** (DIM / (DIM - 2))
        return theta ** (-np.arange(0, DIM, 2) / DIM)

    found = of_two(config, [[1, 2], [1, 2]], lengths=jnp.asarray([64, 200], jnp.int32))
    for row, length in enumerate((64, 200)):
        np.testing.assert_allclose(found[row, 0], wanted(length), rtol=1e-5)
        np.testing.assert_allclose(found[row, 1], wanted(length), rtol=1e-5)
    assert not np.allclose(wanted(64), wanted(200), rtol=0.3)
    one = jnp.asarray([[0, 99]], jnp.int32)  # by default the length is up to the last position
    for default, said in zip(
        rotary_angles(one, config, DIM),
        rotary_angles(one, config, DIM, lengths=jnp.asarray([100], jnp.int32)),
        strict=True,
    ):
        np.testing.assert_array_equal(default, said)


def test_longrope_has_two_sets_of_factors():
    short, long = tuple(np.linspace(1, 2, 8)), tuple(np.linspace(3, 9, 8))
    config = RotaryConfig(
        rope_type="longrope", original_max_position=64, short_factor=short, long_factor=long
    )
    plain = inverse_frequencies(RotaryConfig(), DIM)
    found = of_two(config, [[1], [1]], lengths=jnp.asarray([64, 65], jnp.int32))
    np.testing.assert_allclose(found[0, 0], plain / short, rtol=1e-5)
    np.testing.assert_allclose(found[1, 0], plain / long, rtol=1e-5)


BY_LENGTH = [
    RotaryConfig(rope_type="dynamic", factor=4.0, original_max_position=64),
    RotaryConfig(
        rope_type="longrope",
        original_max_position=64,
        factor=2.0,
        short_factor=(1.0,) * 8,
        long_factor=(3.0,) * 8,
    ),
]


@pytest.mark.parametrize("config", BY_LENGTH, ids=lambda config: config.rope_type)
def test_lengths_under_every_flag(config):
    """With 64-bit numbers, on a mesh of Explicit axes, and for a symbolic batch."""

    def angles(positions):
        return rotary_angles(positions, config, DIM)

    positions = np.array([[0, 9]] * 4 + [[50, 99]] * 4, np.int32)
    wanted = angles(jnp.asarray(positions))
    assert np.abs(wanted[0][4] - np.cos(50.0)).max() > 0.1
    with jax.enable_x64(True):
        wide = angles(jnp.asarray(positions))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    apart = jax.jit(angles)(jax.device_put(positions, rows))
    assert apart[0].sharding.is_equivalent_to(rows, 3)
    (b,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(angles))(jax.ShapeDtypeStruct((b, 2), jnp.int32))
    for found in (wide, apart, exported.call(positions)):
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == jnp.float32
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_turns_the_first_channels_only(interleaved, rng):
    """As a head of that width would turn; in the cache too, whose keys are as wide as before."""
    config = RotaryConfig(theta=100.0, partial_factor=0.75, interleaved=interleaved)
    x = jnp.asarray(rng.standard_normal((2, 3, 4, DIM)), jnp.float32)
    angles = rotary_angles(jnp.asarray([[0, 1, 2], [7, 8, 9]], jnp.int32), config, DIM)
    assert angles[0].shape == (2, 3, 6)
    narrow = rotary_angles(
        jnp.asarray([[0, 1, 2], [7, 8, 9]], jnp.int32), RotaryConfig(theta=100.0), 12
    )
    wanted = apply_rotary(x[..., :12], narrow, interleaved=interleaved)
    y = apply_rotary(x, angles, interleaved=interleaved)
    np.testing.assert_array_equal(y[..., :12], wanted)
    np.testing.assert_array_equal(y[..., 12:], x[..., 12:])
    side = CacheTensor.empty((2, 1, 5, DIM), None, dtype=jnp.float32)
    start = jnp.asarray([0, 2], jnp.int32)
    qkv = x.reshape(2, 3, -1)  # two queries, a key and a value
    q, k, _ = rope_append(qkv, angles, side, side, start, interleaved=interleaved)
    np.testing.assert_array_equal(q, y[:, :, :2])
    np.testing.assert_array_equal(k.codes[1, 0, 2:5], y[1, :, 2])


def test_kernels_leave_partial_rotations_to_xla():
    side = CacheTensor.empty((1, 1, 5, 128), None, dtype=jnp.bfloat16)

    def call(pairs, **options):
        qkv, turns = jnp.zeros((1, 1, 384), jnp.bfloat16), jnp.zeros((1, 1, pairs))
        start = jnp.int32(0)
        return rope_append(qkv, (turns, turns), side, side, start, interleaved=False, **options)

    with pytest.raises(NotImplementedError, match="rotates whole heads, found 32 pairs"):
        call(32, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="of more than the 128 channels of a head"):
        call(65)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "ntk"}, "'ntk' is not supported; supported are 'default', 'linear', 'dyn"),
        ({"partial_factor": 0.0}, r"partial_factor \(=0.0\) must be above 0 and at most 1"),
        ({"partial_factor": 0.01}, r"partial_factor \(=0.01\) of head_dim \(=16\) is no channel"),
        ({"rope_type": "yarn", "theta": 1.0}, r"theta \(=1.0\) must be greater than 1"),
        ({"rope_type": "llama3", "low_freq_factor": 4.0}, r"must be greater than low_freq_factor"),
        ({"rope_type": "longrope"}, "short_factor has 0 entries, expected 8: one for each two of"),
    ],
)
def test_what_is_no_rotation_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        inverse_frequencies(RotaryConfig(**changes), DIM)
