"""On a mesh with Explicit axes, as `jax.make_mesh` makes them, without `jax.set_mesh`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fdq
from tests.models import oracles

PROMPTS = np.ones((2, 7), np.int32)


@pytest.fixture(scope="module")
def models():
    """A model on one device, and with all that divides sharded over two."""
    model = oracles.oracle("llama")[0]
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,))

    def place(a):
        divides = a.ndim == 2 and a.shape[-1] % 2 == 0
        return jax.device_put(a, NamedSharding(mesh, P(None, "tp") if divides else P()))

    return model, jax.tree.map(place, model)


@pytest.mark.slow
def test_log_probabilities_and_evaluation(models):
    one, two = (fdq.generate(m, PROMPTS.tolist(), 5, return_logprobs=True) for m in models)
    assert one[0] == two[0]
    for mine, theirs in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    reports = [fdq.evaluate(m, np.arange(60) % 50) for m in models]
    assert abs(reports[0].nats_per_token - reports[1].nats_per_token) < 1e-4


@pytest.mark.slow
def test_the_functions_of_functional(models):
    found = []
    for model in models:
        fns = fdq.functional(model)
        state = fdq.prefill(model, PROMPTS, fdq.KVCache.init(model.config, 2, 16))
        logits, _ = fns.step(fns.params, state)
        state = fns.init(fns.params, PROMPTS, 16, return_logprobs=True)
        more, state = fns.extend(fns.params, PROMPTS[:, :2], state)
        again, _ = jax.jit(fns.extend)(fns.params, jnp.asarray(PROMPTS[:, :2]), state)
        found.append([np.asarray(a) for a in (logits, more, again, state.logprobs)])
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_rows_and_transposed_products(models):
    mesh = jax.tree.leaves(models[1])[0].sharding.mesh
    q = fdq.quantize(np.random.default_rng(0).standard_normal((256, 64)).astype("f4"), "W8A16")
    x, ids = np.ones((4, 64), "f4"), np.array([1, 200])
    for spec in (P(), P(None, "tp"), P("tp")):
        spread = jax.tree.map(
            lambda a, spec=spec: jax.device_put(
                a, NamedSharding(mesh, spec if a.shape[0] % 2 == 0 else P(None, *spec[1:]))
            ),
            q,
        )
        for run in (lambda f: f, jax.jit):
            transposed = run(lambda x, q: fdq.einsum("bn,kn->bk", x, q))
            np.testing.assert_allclose(transposed(x, spread), transposed(x, q), rtol=1e-4)
            rows = run(fdq.take)
            np.testing.assert_array_equal(rows(spread, ids), rows(q, ids))
