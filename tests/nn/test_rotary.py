"""Rotary positions against complex multiplication, and Llama 3's scaling against its text."""

import jax.numpy as jnp
import numpy as np
import pytest

from fdq.nn import RotaryConfig, apply_rotary, rotary_angles
from fdq.nn.rotary import inverse_frequencies

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


def test_unsupported_types_are_listed():
    with pytest.raises(ValueError, match="'yarn' is not supported; supported are 'default', "):
        RotaryConfig(rope_type="yarn")
