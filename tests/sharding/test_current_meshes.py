"""Sharded models where `jax.set_mesh` made the mesh current, whose axes are Explicit by default."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fdq
from tests.sharding.many_devices import model_of

TOKENS = np.array([[3, 1, 4, 1], [1, 5, 9, 2]], np.int32)
DRAWN = fdq.Sampling(temperature=0.7, top_p=0.9, top_k=40)


def explicit_mesh():
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def test_a_state_lies_on_the_current_mesh():
    one, mesh = model_of("llama", "W4A16C8"), explicit_mesh()
    many = fdq.shard(one, mesh)
    with jax.set_mesh(mesh):
        cache = many.init_cache(2, 16)
        state = fdq.prefill(many, TOKENS, cache)
        assert state.cache.layers[0].k.codes.sharding.mesh == mesh
        whole = fdq.unshard(many)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a, b)
        swapped = state.take([1, 0])
        assert swapped.tokens[:, :4].tolist() == TOKENS[::-1].tolist()
    where = swapped.cache.layers[0].k.codes.sharding
    assert tuple(where.spec)[:2] == ("data", "tensor")


def texts(model, tokens, mesh):
    """What a serving loop does of its own."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        fns = fdq.functional(model)
        state = fns.init(fns.params, tokens, 32, return_logprobs=True)
        _, state = fns.extend(fns.params, tokens[:, :2], state)
        logits, state = jax.jit(fns.step)(fns.params, state)
        state = state.push(jnp.argmax(logits, axis=-1), logits=logits)
        state = fdq.prefill(model, tokens[:, :3], state=state)
        state = fdq.decode(model, state, 3, sampling=DRAWN)
        state = state.rollback(state.length - 1).reseed(jax.random.key(5))
        state = state.take([1, 0]).insert(0, state.take([1]))
        state = fdq.decode(model, state.repeat(2), 3, sampling=DRAWN)
    return np.asarray(state.tokens), np.asarray(state.logprobs)


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("by_hand", [False, True])
def test_what_one_device_says(by_hand):
    """Placed by fdq with the mesh set; by hand and with tokens cut over it, with none set."""
    one, mesh = model_of("llama", "W4A16C8"), explicit_mesh()
    spread = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data")))
    if by_hand:
        everywhere = NamedSharding(mesh, PartitionSpec())
        many = jax.tree.map(lambda a: jax.device_put(a, everywhere), one)
    else:
        many = fdq.shard(one, mesh)
    found, expected = texts(many, spread, None if by_hand else mesh), texts(one, TOKENS, None)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
