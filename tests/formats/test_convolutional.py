"""The convolutional code: decoding bit for bit, and an encoder that finds the nearest codeword."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fdq.formats import convolutional, packing
from fdq.formats.qtensor import QTensor, dequantize
from fdq.quantizers import expected_distortion, quantize_array
from tests.formats.cases import spec
from tests.formats.oracles import fixture

CC2 = spec("cc2", 64, "uint4")


def windows(code, code_scale, code_offset):
    """Values of the four rows of every code, `[..., R, 4, N]`."""
    format = convolutional.CC2
    tables = format.unit_tables({"code_scale": code_scale, "code_offset": code_offset}, CC2)
    return jnp.stack(format.decode_unit([code], CC2, tables), axis=-2)


def numpy_windows(code, code_scale, code_offset):
    """The definition in NumPy's float32, one rounding an operation."""
    word = np.floor(code.astype(np.float32) * code_scale + code_offset + np.float32(0.5))
    word = word.astype(np.int32)
    return np.stack([((word >> s) & 63) - 32 for s in (9, 6, 3, 0)], axis=-2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_windows_equal_numpy_for_every_code_and_many_scales(compiled, rng):
    n = 4096
    code = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, n))
    scale = rng.uniform(20, 130, n).astype(np.float32)
    offset = rng.uniform(-2000, 2000, n).astype(np.float32)
    # Words a hair from an integer, where one rounding more or less changes the floor.
    near = np.round(200 * scale[: n // 2] + offset[: n // 2]) + np.float32(0.5)
    offset[: n // 2] = near - np.float32(200) * scale[: n // 2]
    scale[:2], offset[:2] = (convolutional.CODE_SCALE, 128), (convolutional.CODE_OFFSET, 0)
    run = jax.jit(windows) if compiled else windows
    found = run(jnp.asarray(code), jnp.asarray(scale)[None], jnp.asarray(offset)[None])
    expected = numpy_windows(code, scale, offset)
    np.testing.assert_array_equal(np.asarray(found), expected)
    fused = np.floor(code * scale.astype(np.float64) + offset.astype(np.float64) + 0.5)
    separate = np.floor(code.astype(np.float32) * scale + offset + np.float32(0.5))
    assert (fused != separate).any(), "the sample must tell one rounding from two"


def test_the_windows_of_a_word():
    one = jnp.ones((1, 1), jnp.float32)
    word = 0b101_100_011_010_001
    values = windows(jnp.zeros((1, 1), jnp.uint8), one, word * one)
    expected = [0b101100 - 32, 0b100011 - 32, 0b011010 - 32, 0b010001 - 32]
    assert values[0, :, 0].tolist() == expected


def test_fastdeploy_arrays_decode_as_its_kernel_does():
    a = fixture("fastdeploy", "wint2")
    local = a["weight_scale"]
    # FastDeploy has the even group in the high nibble, fdq in the low one.
    q = QTensor(
        codes=jnp.asarray(a["quant_weight"]),
        scale=jnp.asarray((local << 4) | (local >> 4)),
        code_scale=jnp.asarray(a["code_scale"])[None],
        code_offset=jnp.asarray(a["code_zp"])[None],
        super_scale=jnp.asarray(a["super_scales"].view(ml_dtypes.bfloat16), jnp.float32)[None],
        spec=CC2,
    )
    assert np.abs(a["decoded"]).max() > 0
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantize)(q)), a["decoded"])


def test_every_four_weights_get_their_nearest_codeword(rng):
    w = rng.standard_normal((256, 8)).astype(np.float32)
    q = quantize_array(w, CC2)
    local = np.asarray(packing.unpack(q.scale, 4)).astype(np.float64)
    scale = np.repeat(local, 16, axis=0) * np.asarray(q.super_scale, np.float64)
    vectors = w.reshape(64, 4, 8).astype(np.float64) / scale[:, None]
    book = convolutional.codebook()
    distances = ((vectors[:, None] - book[None, :, :, None]) ** 2).sum(axis=2)
    found = np.take_along_axis(distances, np.asarray(q.codes)[:, None].astype(int), axis=1)
    # The super scale is fitted once more to the chosen codes, so "nearest" holds to about 1%.
    assert (found[:, 0] <= 1.02 * distances.min(axis=1) + 1.0).all()
    exact = np.asarray(q.codes) == distances.argmin(axis=1)
    assert exact.mean() > 0.97


def test_tuned_constants_beat_four_levels_and_the_full_range(rng):
    w = rng.standard_normal((1024, 64)).astype(np.float32)
    error = float(np.mean((np.asarray(dequantize(quantize_array(w, CC2))) - w) ** 2))
    assert error / np.mean(w**2) == pytest.approx(0.1042, rel=0.02)
    assert error < 0.1159  # INT2 with half-integer levels
    assert expected_distortion(CC2).value == pytest.approx(error, rel=0.03)


def test_importance_moves_the_error_to_unimportant_rows(rng):
    w = rng.standard_normal((128, 16)).astype(np.float32)
    h = np.where(np.arange(128) % 4 == 0, 20.0, 1.0).astype(np.float32)
    plain = np.asarray(dequantize(quantize_array(w, CC2)))
    guided = np.asarray(dequantize(quantize_array(w, CC2, importance=h)))
    important = h > 1
    assert ((guided - w)[important] ** 2).mean() < 0.7 * ((plain - w)[important] ** 2).mean()
    assert ((guided - w) ** 2).mean() > ((plain - w) ** 2).mean()
    assert (h[:, None] * (guided - w) ** 2).mean() < (h[:, None] * (plain - w) ** 2).mean()


def test_an_odd_number_of_groups_fills_half_a_byte(rng):
    w = rng.standard_normal((192, 3)).astype(np.float32)
    q = quantize_array(w, CC2)
    assert q.scale.shape == (2, 3)
    assert q.shape == (192, 3)
    assert not np.any(np.asarray(q.scale)[1] >> 4)
    assert dequantize(q).shape == (192, 3)


def test_other_groups_are_refused():
    with pytest.raises(ValueError, match="cc2.*defined with groups of 64 and uint4 scales"):
        spec("cc2", 128, "uint4")
    with pytest.raises(ValueError, match="has no method 'absmax'"):
        quantize_array(jnp.ones((128, 4)), CC2, method="absmax")
