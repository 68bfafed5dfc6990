"""Checkpoints that older versions wrote are read for ever, to the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdq
from fdq_checkpoints import inspect, load
from tests.covering import slow_but
from tests.oracles.make_golden import GOLDEN

FOLDERS = sorted(path.name for path in GOLDEN.iterdir())


@pytest.mark.parametrize("name", slow_but({"v1_first"}, FOLDERS))
def test_values_and_logits_are_what_they_were(name):
    folder = GOLDEN / name
    tree, expected = load(folder / "tree"), np.load(folder / "expected.npz")
    assert inspect(folder / "tree", verify=True).verified
    for key in expected.files:
        if key.startswith("plain."):
            found = tree["plain"][key.removeprefix("plain.")]
        else:
            found = fdq.dequantize(tree[key])
        assert found.dtype == expected[key].dtype and found.shape == expected[key].shape, key
        np.testing.assert_array_equal(found, expected[key], err_msg=key)
    assert tree["plain"]["bfloat16"].dtype == jnp.bfloat16
    assert (
        jax.random.key_data(tree["key"]).tolist() == jax.random.key_data(jax.random.key(7)).tolist()
    )
    model = load(folder / "model")
    assert inspect(folder / "model", verify=True).scheme == "W4A8C8-g16"
    logits = model(jnp.array([[1, 5, 9, 2, 8, 3]]))
    # Products of other machines and versions round differently.
    np.testing.assert_allclose(logits, np.load(folder / "logits.npy"), atol=2e-2)
