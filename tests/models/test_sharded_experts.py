"""Experts on a mesh axis: each device multiplies by its own, and nobody gathers the codes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fdq
from fdq import nn
from tests.closeness import error
from tests.covering import slow
from tests.models import oracles


def spread(tree, mesh):
    """Stacks of experts over `ep`; what else there is everywhere."""

    def put(path, array):
        spec = P("ep") if "experts" in jax.tree_util.keystr(path) else P()
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, tree)


def gathered(text):
    """Elements of the largest array that any device gets from others, sums apart."""
    moved = r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|collective-permute|all-to-all)"
    sizes = [np.prod([int(n) for n in m.split(",") if n]) for m in re.findall(moved, text)]
    return max(sizes, default=0)


@pytest.mark.parametrize(
    ("name", "t"), [("W4A16-g32", 40), slow("W4A16-g32", 2), slow("W8A16", 40), slow(None, 40)]
)
def test_products_and_derivatives(name, t, rng):
    mesh = jax.make_mesh((4, 2), ("ep", "tp"))
    w = jnp.asarray(rng.standard_normal((8, 64, 32)), jnp.float32)
    q = w if name is None else fdq.quantize(w, name)
    values = np.asarray(w if name is None else fdq.dequantize(q), np.float64)
    x = jnp.asarray(rng.standard_normal((t, 64)), jnp.float32)
    index = rng.integers(0, 7, (t, 2))
    sharded = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("ep"))), q)

    with jax.set_mesh(mesh):
        arguments = x, sharded, jnp.asarray(index, jnp.int32)
        product = jax.jit(fdq.grouped_matmul)
        assert gathered(product.lower(*arguments).compile().as_text()) == 0
        y = product(*arguments)
        dx = jax.grad(lambda x: jnp.sin(product(x, *arguments[1:])).sum())(x)
    expected = np.einsum("tk,tpkn->tpn", np.asarray(x, np.float64), values[index])
    assert error(y, expected) < 5e-6
    assert error(dx, np.einsum("tpn,tpkn->tk", np.cos(expected), values[index])) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_a_layer_of_experts_gathers_no_codes(kind, rng):
    layer = fdq.quantize(nn.Experts(4, 32, 32, rngs=nnx.Rngs(0)), "W4A16-g32")
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(kind,))
    spec = NamedSharding(mesh, P("ep"))
    template, params = nn.split(jax.tree.map(lambda a: jax.device_put(a, spec), layer))
    x = jnp.asarray(rng.standard_normal((3, 32)), jnp.float32)
    arguments = x, jnp.int32([[0, 3], [1, 2], [3, 1]]), jnp.full((3, 2), 0.5)

    def run(template, params):
        return nn.bind(template, params)(*arguments)

    with jax.set_mesh(mesh):
        compiled = jax.jit(run, static_argnums=0).lower(template, params).compile()
        np.testing.assert_allclose(compiled(params), layer(*arguments), rtol=0, atol=1e-6)
    codes = params["down_proj"]["kernel"].codes.size
    assert "all-reduce" in compiled.as_text() and gathered(compiled.as_text()) < codes
    if kind == AxisType.Auto:
        # Where nobody noted the axis XLA gathers: the measure sees it.
        other = nn.split(layer)[0]
        with jax.set_mesh(mesh):
            compiled = jax.jit(run, static_argnums=0).lower(other, params).compile()
        assert gathered(compiled.as_text()) >= codes


@pytest.mark.slow
def test_a_decode_step_gathers_no_codes():
    """On the mesh that `jax.make_mesh` makes, which nobody has set."""
    model, expected = oracles.oracle("ernie4_5_moe")
    model = fdq.quantize(model, "W4A16-g16")
    prompt = [expected["prompt"][0].tolist()]
    tokens = fdq.generate(model, prompt, 3, stop_tokens=())
    sharded = spread(model, jax.make_mesh((2,), ("ep",)))
    assert fdq.generate(sharded, prompt, 3, stop_tokens=()) == tokens
    fns = fdq.functional(sharded)
    cache = fdq.KVCache.init(model.config, 1, 32)
    state = fdq.prefill(sharded, jnp.asarray(prompt), cache)
    text = jax.jit(fns.step).lower(fns.params, state).compile().as_text()
    stack = min(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(fns.params)
        if "experts" in jax.tree_util.keystr(path) and leaf.dtype == jnp.uint8
    )
    assert "all-reduce" in text
    assert gathered(text) < stack / 4
