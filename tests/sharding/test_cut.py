"""Cut tensors: what each device has is a weight by itself, and all of it makes the whole again."""

import jax
import numpy as np
import pytest

import fdq
from fdq.sharding import make_mesh
from fdq.sharding.cut import Cut, Dealt, placed, smaller_blocks, whole
from tests.covering import slow

FORMATS = [
    slow("W8A16"), "W4A16", slow("W4A16-asym"), slow("W3A16-g64"), slow("W2A16-g64"),
    slow("WNF4A16-g64"), "Wfp8A16-b128", slow("WMXFP4A16"), slow("WNVFP4A16"), slow("wint2"),
]  # fmt: skip


def of_device(q, at):
    """The QTensor that one device has."""
    return jax.tree.map(lambda a: a.addressable_shards[at].data, q)


def quantized(name, rng, shape=(1024, 64)):
    w = np.asarray(rng.standard_normal(shape), np.float32)
    return fdq.quantize(w, name, method=None if name == "wint2" else "absmax")


def equal(one, other):
    assert (one.spec, one.padding) == (other.spec, other.padding)
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(other.arrays()[name]))


@pytest.mark.parametrize("name", FORMATS)
def test_rows(name, rng):
    q, mesh = quantized(name, rng), make_mesh({"tensor": 8})
    cut = Cut("rows", (("tensor",), ()))
    spread = placed(q, cut, mesh)
    values = np.asarray(fdq.dequantize(q))
    for at in (0, 3, 7):
        own = of_device(spread, at)
        assert own.shape == (128, 64)
        np.testing.assert_array_equal(fdq.dequantize(own), values[128 * at : 128 * (at + 1)])
    equal(whole(spread, cut, mesh), q)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("host", [True, slow(False)])
def test_heads_of_which_some_are_repeated(name, host, rng):
    """Eight query heads and two of keys and values, of 32 columns, on four devices."""
    q, mesh = quantized(name, rng, (256, 12 * 32)), make_mesh({"tensor": 4})
    dealt = Dealt(4, (8 * 32, 2 * 32, 2 * 32), 32, (1, 2, 2))
    new = smaller_blocks(q.spec, dealt.widths)
    old = None if new == q.spec else q.spec
    cut = Cut("heads", ((), ("tensor",)), dealt, spec=old, widths=tuple(dealt.widths))
    held = jax.tree.map(np.asarray, q) if host else q
    spread = placed(held, cut, mesh)
    heads = np.asarray(fdq.dequantize(q)).reshape(256, 12, 32)
    for at in range(4):
        mine = [2 * at, 2 * at + 1, 8 + at // 2, 10 + at // 2]
        own = fdq.dequantize(of_device(spread, at))
        np.testing.assert_array_equal(own, heads[:, mine].reshape(256, -1))
    equal(whole(spread, cut, mesh), q)


def test_abstract_tensors_have_the_shapes_of_real_ones(rng):
    q, mesh = quantized("Wfp8A16-b128", rng, (256, 384)), make_mesh({"tensor": 4})
    dealt = Dealt(4, (256, 64, 64), 32, (1, 2, 2))
    cut = Cut("heads", ((), ("tensor",)), dealt, spec=q.spec, widths=tuple(dealt.widths))
    real = placed(q, cut, mesh)
    shapes = placed(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), q), cut, mesh)
    for one, other in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)
    assert real.spec == shapes.spec and real.spec.block_size == (128, 32)
