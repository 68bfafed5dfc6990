"""float8 rows times block-wise float8 weights in the interpreter, against NumPy in float64."""

import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.matmul import float8_blocks as kernels
from tests.canonical_weights import Case, generator, random_weight
from tests.closeness import error
from tests.covering import longest

BLOCKS = Case("float8_e4m3", "block", block_size=(128, 128), scale_dtype=np.float32)


def rows(*shape):
    """Codes, scales that differ from group to group, and what they mean."""
    rng = generator("float8 rows", shape)
    codes = (rng.normal(size=shape) * 20).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.01, 0.1, (*shape[:-1], -(-shape[-1] // 128))).astype(np.float32)
    values = codes.astype(np.float64) * np.repeat(scale, 128, axis=-1)[..., : shape[-1]]
    return jnp.asarray(codes), jnp.asarray(scale), values


@pytest.mark.parametrize(
    ("m", "k", "n", "dtype", "bound"),
    [
        longest(65, 128, 100, jnp.float32, 1e-6),  # one group, one program
        # More groups than are in shared memory at a time, the last cut off; 2 x 2 programs.
        longest(130, 700, 200, jnp.bfloat16, 0.004),
        longest(129, 1280, 128, jnp.float32, 1e-6),
    ],
)
def test_it_is_the_product(m, k, n, dtype, bound):
    w, values = random_weight(BLOCKS, k, n)
    codes, scale, x = rows(m, k)
    y = kernels.float8_blocks(codes, scale, w, dtype)
    assert (y.shape, y.dtype) == ((m, n), dtype)
    assert error(y, x @ values) < bound


def test_the_reference_is_the_product():
    w, values = random_weight(BLOCKS, 300, 200)
    codes, scale, x = rows(7, 300)
    assert error(kernels.float8_blocks_reference(codes, scale, w), x @ values) < 1e-6


def batch(codes, scale, w):
    return jax.vmap(lambda x, s: kernels.float8_blocks(x, s, w, jnp.float32))(codes, scale)


@pytest.mark.slow
@pytest.mark.longest
def test_a_batch():
    w, values = random_weight(BLOCKS, 128, 128)
    codes, scale, x = rows(2, 33, 128)
    assert error(batch(codes, scale, w), x @ values) < 1e-6


def test_a_batch_is_one_launch_of_more_rows(monkeypatch):
    launched = []

    def launch(body, operands, *, out_type, **_):
        launched.append(out_type.shape)
        return jnp.zeros(out_type.shape, out_type.dtype)

    monkeypatch.setattr(kernels, "launch", launch)
    w, _ = random_weight(BLOCKS, 128, 128)
    codes, scale, _ = rows(2, 200, 128)
    assert jax.eval_shape(batch, codes, scale, w).shape == (2, 200, 128)
    assert launched[-1] == (512, 128)  # after one of the example that is traced


def test_what_does_not_fit_is_refused(monkeypatch):
    w, _ = random_weight(BLOCKS, 256, 128)
    codes, scale, _ = rows(4, 256)
    for arguments, message in (
        ((codes[:, :128], scale, w, jnp.float32), r"expected \[M, K\]"),
        ((codes, scale[:, :1], w, jnp.float32), r"expected \[M, K\]"),
        ((codes.astype(jnp.float32), scale, w, jnp.float32), "x of float32"),
        ((codes, scale, w, jnp.int8), "a result of int8"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.float8_blocks(*arguments)
    for other in (
        Case("float8_e4m3", "channel", scale_dtype=np.float32),
        Case("float8_e4m3", "block", block_size=(128, 64), scale_dtype=np.float32),
        Case("int4", "group", 128),
    ):
        layout = random_weight(other, 256, 128)[0].layout
        assert "in blocks of 128 x 128" in str(kernels.unsupported(layout))
    assert kernels.unsupported(w.layout) is None
    for capability in ("7.5", "8.9", "10.0", "12.0", "gfx90a"):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(kernels, "default_device", lambda device=device: device)
        assert "only sm_90 has wgmma" in str(kernels.unsupported(w.layout))
    with pytest.raises(ValueError, match="only sm_90 has wgmma, found gfx90a"):
        kernels.float8_blocks(codes, scale, w, jnp.float32)
