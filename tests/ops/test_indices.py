"""Indices of any integers: rows of quantized tables, embeddings, experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdq
from fdq.models import Decoder, DecoderConfig
from fdq.nn import RotaryConfig
from fdq.ops.indices import as_indices
from tests.covering import longest, slow

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "uint64")


@pytest.fixture(scope="module")
def table():
    w = np.random.default_rng(0).standard_normal((300, 64)).astype("float32")
    return fdq.quantize(w, "W8A16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_found_by_integers_of_any_width(dtype, table):
    """256 rows and more do not fit a byte: arithmetic in it would wrap around."""
    ids = np.array([0, 5, 100], dtype)
    wanted = np.asarray(fdq.dequantize(table))[[0, 5, 100]]
    for w in (table, fdq.prepare(table)):
        for found in (fdq.take(w, ids), jax.jit(fdq.take)(w, ids), fdq.take(w, ids, mode="clip")):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("ids", [2**40, 2**31, -(2**40), 300, -301, np.uint32(2**32 - 1)])
def test_rows_that_there_are_not_are_nan_or_the_nearest(ids, table):
    rows = np.asarray(fdq.dequantize(table))
    assert np.isnan(fdq.take(table, np.array([ids]))).all()
    nearest = rows[-1] if ids > 0 else rows[0]
    np.testing.assert_array_equal(fdq.take(table, np.array([ids]), mode="clip")[0], nearest)


def test_what_is_beyond_32_bits_stays_beyond_under_x64():
    with jax.enable_x64(True):
        found = as_indices(jnp.array([2**40, 7, -(2**40)]), "ids")
    assert found.dtype == jnp.int32
    assert found.tolist() == [2**31 - 1, 7, -(2**31)]


@pytest.mark.parametrize("dtype", [slow("uint8"), longest("uint16")])
def test_quantized_embeddings_of_narrow_tokens(dtype):
    config = DecoderConfig(
        model_type="llama", vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=1,
        num_heads=4, num_kv_heads=2, head_dim=8, rms_norm_epsilon=1e-5, max_position=64,
        rotary=RotaryConfig(theta=1e4), dtype="float32",
    )  # fmt: skip
    model = Decoder(config, rngs=nnx.Rngs(0))
    model = fdq.quantize(model, [("embed_tokens.embedding", "W8A16"), ("*", "W8A16")])
    tokens = jnp.array([[1, 200, 255, 7]], dtype)
    np.testing.assert_array_equal(model(tokens), model(tokens.astype(jnp.int32)))
    table = nnx.Embed(300, 64, rngs=nnx.Rngs(0))
    table = fdq.quantize(table, [("embedding", "W8A16")])
    np.testing.assert_array_equal(table(tokens), table(tokens.astype(jnp.int32)))


def test_rows_are_floats(table):
    with pytest.raises(TypeError, match="take: dtype=int8; expected a dtype of floats"):
        fdq.take(table, np.array([1]), dtype="int8")
    with pytest.raises(TypeError, match="take: ids: expected integers, found float64"):
        fdq.take(table, np.array([1.0]))


@pytest.mark.parametrize(
    ("index", "error", "said"),
    [
        ([0.0, 1.9], TypeError, "expert_index: expected integers, found float64"),
        ([False, True], TypeError, "expert_index: expected integers, found bool"),
        ([0, 5], ValueError, r"expert_index ranges over 0 ... 5, expected 0 ... 1"),
        ([0, -1], ValueError, r"expert_index ranges over -1 ... 0, expected"),
        ([0, 2**40], ValueError, "expert_index ranges over"),
    ],
)
def test_experts_that_there_are_not(index, error, said, rng):
    q = fdq.quantize(rng.standard_normal((2, 64, 32)).astype("float32"), "W4A16-g32")
    x = jnp.ones((2, 64))
    with pytest.raises(error, match=said):
        fdq.grouped_matmul(x, q, index)
    found = fdq.grouped_matmul(x, q, [1, 0])
    np.testing.assert_array_equal(found, fdq.grouped_matmul(x, q, np.array([1, 0], np.uint8)))


@pytest.mark.parametrize("index", [np.array([0, 9]), 1.0, "a", np.array([True, False]), -6])
def test_a_stack_is_picked_from_by_integers_that_it_has(index, rng):
    stack = fdq.quantize(rng.standard_normal((5, 64, 32)).astype("float32"), "W4A16-g32")
    with pytest.raises(IndexError):
        stack[index]
    assert stack[np.array([0, -1])].shape == (2, 64, 32)
    assert stack[np.array([True, False, True, False, False])].shape == (2, 64, 32)
