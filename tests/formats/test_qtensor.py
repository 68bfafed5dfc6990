"""QTensor as a pytree: paths, Variables, layouts, shapes of abstract arrays."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdq.formats.qtensor import QTensor, QuantizedWeight, dequantize, materialize
from fdq.quantizers import quantize_array
from tests.formats.cases import spec

INT8 = spec("int8")


class QCodes(nnx.Variable):
    pass


@pytest.fixture
def q(rng):
    return quantize_array(rng.standard_normal((24, 6)).astype(np.float32), spec("int4", 8))


def test_paths_name_the_arrays(q):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".codes", ".scale"]
    assert list(q.arrays()) == ["codes", "scale"]


def test_arrays_are_those_of_the_format(q, rng):
    assert q.replace(scale=q.scale).arrays() == q.arrays()
    with pytest.raises(AttributeError, match="no attribute 'zero'; its arrays are codes, scale"):
        _ = q.zero
    with pytest.raises(AttributeError, match="immutable"):
        q.codes = q.codes
    with pytest.raises(ValueError, match="W4-g8 has the arrays codes, scale, found codes, zero"):
        QTensor(codes=q.codes, zero=q.scale, spec=q.spec)
    with pytest.raises(ValueError, match="found codes"):
        QTensor(codes=q.codes, spec=q.spec)
    w = rng.standard_normal((64, 6)).astype(np.float32)
    double = quantize_array(w, spec("nf4", 64, double_quantization=True))
    assert list(double.arrays()) == ["codes", "scale", "super_scale", "scale_offset"]
    given_backwards = QTensor(spec=q.spec, scale=q.scale, codes=q.codes)
    assert jax.tree.structure(given_backwards) == jax.tree.structure(q)
    copied = copy.deepcopy(q)
    np.testing.assert_array_equal(np.asarray(copied.codes), np.asarray(q.codes))


def test_tree_map_to_none_and_back(q):
    leaves, structure = jax.tree.flatten(q)
    empty = jax.tree.map(lambda x: None, q)
    assert isinstance(empty, QTensor)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.spec, again.padding) == (q.spec, q.padding)
    restored = jax.tree.unflatten(structure, [np.array(a) for a in leaves])
    np.testing.assert_array_equal(np.asarray(dequantize(restored)), np.asarray(dequantize(q)))


def test_a_saved_tree_of_names_comes_back(q, tmp_path):
    """What a checkpoint does: arrays by name, static fields apart, a template made from these."""
    np.savez(tmp_path / "q.npz", **{n: np.asarray(a).view(np.uint8) for n, a in q.arrays().items()})
    template = jax.eval_shape(lambda: quantize_array(jnp.zeros((24, 6)), spec("int4", 8)))
    assert jax.tree.structure(template) == jax.tree.structure(q)
    with np.load(tmp_path / "q.npz") as stored:
        arrays = {
            name: jnp.asarray(stored[name].view(a.dtype)).reshape(a.shape)
            for name, a in template.arrays().items()
        }
    back = template.replace(**arrays)
    np.testing.assert_array_equal(np.asarray(dequantize(back)), np.asarray(dequantize(q)))


def test_variables_as_fields(q):
    boxed = q.replace(codes=QCodes(q.codes), scale=QCodes(q.scale))
    assert boxed.shape == (24, 6)
    assert boxed.nbytes == q.nbytes
    raw = materialize(boxed)
    assert isinstance(raw.codes, jax.Array)
    assert materialize(q) is q
    expected = np.asarray(dequantize(q))
    np.testing.assert_array_equal(np.asarray(dequantize(boxed)), expected)

    class Holder(nnx.Module):
        def __init__(self):
            self.kernel = boxed

    holder = Holder()
    graphdef, state = nnx.split(holder)
    assert len(jax.tree.leaves(state)) == 2
    assert not jax.tree.leaves(nnx.state(holder, nnx.Param))
    merged = nnx.merge(graphdef, state)
    np.testing.assert_array_equal(np.asarray(dequantize(merged.kernel)), expected)


class Swapped(QuantizedWeight):
    """The codes transposed: another type that stands for a weight."""

    layout = "swapped"

    def __init__(self, q):
        self.q = q.replace(codes=jnp.swapaxes(q.codes, -1, -2))
        self.spec, self.padding = q.spec, q.padding

    def arrays(self):
        return {"q": self.q}

    def replace(self, **changes):
        raise AssertionError("it holds no Variables")

    def canonical(self):
        return self.q.replace(codes=jnp.swapaxes(self.q.codes, -1, -2))

    @property
    def shape(self):
        *lead, n, k = self.q.codes.shape
        return (*lead, 2 * k, n)


def unflatten(_, children):
    swapped = object.__new__(Swapped)
    (swapped.q,) = children
    swapped.spec, swapped.padding = swapped.q.spec, swapped.q.padding
    return swapped


jax.tree_util.register_pytree_node(Swapped, lambda w: ((w.q,), None), unflatten)


def test_another_type_of_weight_decodes(q):
    other = Swapped(q)
    assert other.layout == "swapped" and q.layout == "canonical"
    assert other.shape == (24, 6) and other.size == q.size and other.nbytes == q.nbytes
    assert repr(other).startswith("Swapped([24, 6], int4, ") and "swapped" in repr(other)
    expected = np.asarray(dequantize(q))
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantize)(other)), expected)
    np.testing.assert_array_equal(np.asarray(other.canonical().codes), np.asarray(q.codes))
    abstract = jax.eval_shape(lambda q: q, other)
    assert abstract.shape == (24, 6) and abstract.is_abstract
    assert dequantize(abstract).shape == (24, 6)


def test_sizes_of_a_stack(q):
    stacked = jax.tree.map(lambda a: jnp.stack([a, a, a]), q)
    assert stacked.shape == (3, 24, 6)
    assert stacked.ndim == 3
    assert stacked.size == 3 * 24 * 6
    assert stacked.nbytes == 3 * q.nbytes == 3 * (12 * 6 + 3 * 6 * 2)
    assert stacked.bits_per_weight == q.bits_per_weight == 6.0


def test_placement_of_the_result_follows_the_arrays(q):
    device = jax.devices()[3]
    moved = jax.device_put(q, device)
    assert dequantize(moved).devices() == {device}


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_matrices_have_no_bits(q, lead):
    none = jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), a.dtype), q)
    assert none.shape == (*lead, *q.shape)
    assert none.bits_per_weight == 0 and "int4" in repr(none)
