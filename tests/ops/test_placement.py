"""Where the weights lie decides whether kernels are looked at, not how many devices there are."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fdq
from fdq import ops
from fdq.ops.placement import devices, sharded


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((2,), ("tp",), axis_types=(request.param,))


def spread(q, mesh):
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(None, "tp"))), q)


def test_arrays_and_tracers_say_where_they_lie(mesh):
    assert len(jax.devices()) > 1
    q = fdq.quantize(jnp.ones((64, 32)), "W4A16-g32")
    other = jax.device_put(jnp.ones(3), jax.devices()[1])
    assert sharded(q, other) is None and devices(q) == 1
    spread_q = spread(q, mesh)
    assert "the mesh {'tp': 2}" in str(sharded(jnp.ones(3), spread_q)) and devices(spread_q) == 2
    found = []

    @jax.jit
    def trace(q, x):
        found.extend([sharded(q), sharded(x)])
        return x

    trace(spread_q, jnp.ones(3))
    assert "tp" in found[0] and found[1] is None

    def shard(a):
        found.append(sharded(a))
        return a

    jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P(None, "tp"), out_specs=P(None, "tp")))(
        spread_q.codes
    )
    assert found[2] is None


def test_weights_of_one_device_are_prepared_among_many(mesh):
    q = fdq.quantize(jnp.ones((64, 32)), "W4A16-g32")
    assert ops.prepare(q, "gpu").layout == "mosaic_gpu"
    assert ops.prepare(spread(q, mesh), "gpu").layout == "canonical"
    x = jnp.ones((2, 64))
    with pytest.raises(NotImplementedError, match="arrays may be sharded over the mesh"):
        fdq.matmul(x, spread(q, mesh), implementation="mosaic_gpu")
