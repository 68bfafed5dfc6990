"""A format of somebody else's: one object, and kernels read it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.aot.kernel_cases import all_cases
from pallas_kernels.matmul.matrix_vector import matrix_vector
from pallas_kernels.weights.decoded_weight import decoded_weight
from pallas_kernels.weights.formats import WORD_FORMATS
from pallas_kernels.weights.kernel_weight import from_kernel, to_kernel
from pallas_kernels.weights.word_format import Storage, WordFormat, shift_right

K, N, GROUP = 128, 136, 32


@dataclasses.dataclass(frozen=True)
class SquareWords(WordFormat):
    """Bytes that stand for their square minus a number of the column."""

    def decode(self, words, columns, interpreted, layout=None):
        (word,), (middle,) = words, columns
        codes = [shift_right(word, 8 * i) & jnp.int32(255) for i in range(4)]
        return [code.astype(jnp.float32) * code.astype(jnp.float32) - middle for code in codes]


@pytest.fixture
def squares(monkeypatch):
    storage = Storage("squares", group_size=GROUP, scale_dtype="float8_e8m0fnu")
    words = SquareWords("square", words=1, rows=4, columns=("middle",), storages=(storage,))
    monkeypatch.setitem(WORD_FORMATS, "square", words)


@pytest.fixture
def arrays(rng):
    return {
        "codes": rng.integers(0, 256, (K, N)).astype(np.uint8),
        "scale": rng.integers(110, 114, (K // GROUP, N)).astype(np.uint8).view(jnp.float8_e8m0fnu),
        "middle": rng.uniform(20000, 22000, (1, N)).astype(np.float32),
    }


def test_kernels_read_a_format_that_joins_the_table(squares, arrays, rng):
    settings = {"format": "square", "granularity": "group", "group_size": GROUP, "k": K, "n": N}
    weight = jax.jit(lambda arrays: to_kernel(arrays, **settings))(arrays)
    back = from_kernel(weight)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert np.asarray(back[name]).tobytes() == array.tobytes(), name
    values = arrays["codes"].astype(np.float64) ** 2 - arrays["middle"]
    values = values * np.repeat(arrays["scale"].astype(np.float64), GROUP, axis=0)
    np.testing.assert_allclose(decoded_weight(weight), values, rtol=1e-5, atol=1e-3)
    x = rng.normal(size=(2, K))
    wanted = x @ values
    found = matrix_vector(jnp.asarray(x, jnp.float32), weight).sum(0)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_its_arrays_are_checked(squares, arrays):
    settings = {"format": "square", "granularity": "group", "group_size": GROUP, "k": K, "n": N}
    with pytest.raises(ValueError, match="needs middle; found codes, scale"):
        to_kernel({name: arrays[name] for name in ("codes", "scale")}, **settings)
    with pytest.raises(ValueError, match=rf"middle of a square weight .* \[..., 1, {N}\]"):
        to_kernel(arrays | {"middle": arrays["middle"][:, :1]}, **settings)


def test_it_is_compiled_ahead_of_time_as_others_are(squares):
    kernels = {case.kernel for case in all_cases()}
    assert {"matrix-vector squares", "experts squares"} <= kernels
