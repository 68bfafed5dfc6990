"""A model whose weights are spread over devices says and decodes the same."""

import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fdq
from tests.covering import longest
from tests.models import oracles


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axis_type", "is_set"),
    [
        ("ernie4_5_moe", AxisType.Explicit, False),
        longest("ernie4_5_moe", AxisType.Auto, True),
        longest("deepseek_v3", AxisType.Explicit, False),
        ("gpt_oss", AxisType.Explicit, False),
    ],
    ids=str,
)
def test_weights_sharded_over_output_channels(name, axis_type, is_set):
    """Also on a mesh that nobody has set: arrays carry it along."""
    model, expected = oracles.oracle(name)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))

    def put(array):
        last = "x" if array.ndim >= 2 and array.shape[-1] % 2 == 0 else None
        spec = PartitionSpec(*[None] * (array.ndim - 1), last)
        return jax.device_put(array, NamedSharding(mesh, spec))

    sharded = jax.tree.map(put, model)
    prompts, lengths, tokens, _ = oracles.greedy_batch(expected)
    rows = [row[:length].tolist() for row, length in zip(prompts[:2], lengths, strict=False)]
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        run = jax.jit(lambda model, ids: model(ids)) if is_set else sharded.__call__
        arguments = (sharded, expected["input_ids"]) if is_set else (expected["input_ids"],)
        logits = run(*arguments)
        np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
        assert fdq.generate(sharded, rows, 4, stop_tokens=()) == [t[:4] for t in tokens[:2]]
        warm = fdq.Sampling(temperature=0.01, top_k=5, top_p=0.9)
        drawn = fdq.generate(sharded, rows, 4, stop_tokens=(), sampling=warm)
    assert [row[0] for row in drawn] == [t[0] for t in tokens[:2]]
