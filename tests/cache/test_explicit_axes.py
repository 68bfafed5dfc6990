"""Caches on a mesh of Explicit axes, as `jax.make_mesh` makes them: rows, blocks and rings."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fdq.cache import KVCache, LayerCache
from fdq.ops.rope_append.ring import unrolled, write_ring
from fdq.ops.rope_append.xla import write_slots
from tests.covering import slow

HEADS, DIM, SLOTS, WINDOW = 2, 8, 64, 4
CONFIG = types.SimpleNamespace(
    num_layers=1, num_kv_heads=HEADS, head_dim=DIM, dtype="float32", ring_window=lambda _: WINDOW
)


def step(cache, x, at):
    """What a layer does with three keys and values from slot `at` [B] on, and what they see."""
    pair, seen = [], []
    for side in cache.layers[0]:
        if side.window is None:
            pair.append(write_slots(side, x, at).settled())
        else:
            new = side.encode(x.swapaxes(1, 2))
            seen.append(unrolled(side, new, at)[0].dequantize())
            pair.append(write_ring(side, new, at, None))
    length, reach = at + x.shape[1], cache.reach
    reach = None if reach is None else length
    return KVCache((LayerCache(*pair),), length, reach, cache.positions), seen


@pytest.mark.parametrize(
    ("name", "is_set"),
    [("C8", True), slow("C4-kvblock", False), slow("C4", False), slow("C16", True)],
)
def test_what_one_device_says(name, is_set, rng):
    """Written, taken and put into another, whether the mesh is set or not."""
    mesh = jax.make_mesh((2, 2), ("data", "tp"), axis_types=(AxisType.Explicit,) * 2)
    where = NamedSharding(mesh, PartitionSpec("data", "tp"))
    # Before the ring of 16 slots ends, and over a border of blocks.
    x, at = rng.standard_normal((2, 3, HEADS, DIM)).astype("f4"), np.array([14, 30], np.int32)
    found = []
    for sharding in (None, where):
        with jax.set_mesh(mesh) if is_set and sharding else contextlib.nullcontext():
            cache = KVCache.init(CONFIG, 2, SLOTS, name, sharding=sharding, spare=4)
            placed = jnp.asarray(x)
            if sharding is not None:
                placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None, "tp")))
            cache, seen = jax.jit(step)(cache, placed, at)
            taken = cache.take([1])
            others = taken, cache.take([1, 0]), cache.insert(0, taken)
        found.append(jax.tree.map(np.asarray, (cache, seen, *others)))
        if sharding is not None:
            for one in (cache, *others[1:]):
                codes = one.layers[0].v.codes
                assert tuple(codes.sharding.spec)[:2] == ("data", "tp"), codes.sharding
            assert taken.layers[0].k.codes.sharding.spec[0] is None  # one row over two devices
    for one, many in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, many)
