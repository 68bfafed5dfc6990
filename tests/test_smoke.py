"""The shortest way through the whole library."""

import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

import fdq
from fdq.analysis.shipped_model import shipped_model_path


def test_a_matrix_goes_all_the_way():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((256, 64)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 256)), jnp.float32)
    q = fdq.quantize(w, "W4A16")
    assert_close(fdq.matmul(x, q), x @ fdq.dequantize(q), of_largest=1e-5)


@pytest.mark.slow  # by default the README's first script goes as far
def test_a_model_goes_all_the_way():
    model = fdq.load(shipped_model_path(), "W4A16C8")
    (tokens,) = fdq.generate(model, [[1, 5, 9]], 3, stop_tokens=())
    assert len(tokens) == 3
