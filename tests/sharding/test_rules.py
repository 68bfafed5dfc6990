"""Rules and meshes: what does not belong together is refused with what to do."""

import jax
import pytest
from flax import nnx
from jax.sharding import AxisType

import fdq
import fdq.models
from fdq.schemes.mesh_rules import abstract_mesh, repeats
from fdq.sharding import Rules, make_mesh, parse_mesh
from tests.sharding.many_devices import config_of


def tiny():
    """A model with one array that has values."""
    model = fdq.models.abstract(config_of("llama", num_layers=0))
    model.norm.scale = nnx.Param(jax.numpy.ones(128))
    return model


def mesh(**sizes):
    return make_mesh(sizes)


def test_an_axis_that_cuts_nothing_of_a_model_is_noted():
    notes = fdq.shard(tiny(), mesh(tensor=2, expert=2)).placement.notes
    assert notes == (
        "axis expert: nothing in this model is cut over it, its 2 devices do the same",
    )


def test_meshes_of_explicit_axes_count_as_auto():
    explicit = jax.make_mesh((2,), ("tensor",))
    assert explicit.axis_types == (AxisType.Explicit,)
    checked = Rules().check(explicit)
    assert checked.axis_types == (AxisType.Auto,) and checked.shape == {"tensor": 2}
    assert checked.devices.tolist() == explicit.devices.tolist()


def test_axes_of_size_one_and_axes_that_are_not_there_cut_nothing():
    rules, one = Rules(heads=("tensor", "expert")), mesh(tensor=4, expert=1)
    assert rules.axes("heads", rules.check(one)) == ("tensor",)
    assert Rules().axes("batch", one) == ()


@pytest.mark.parametrize(
    ("rules", "sizes", "said"),
    [
        (Rules(heads="tp"), {"tensor": 2}, "no axis 'tp', it has tensor=2"),
        (Rules(), {"x": 2}, r"no rule uses the axis 'x'.*Rules\(heads='x'"),
        (Rules(batch="tensor"), {"tensor": 2}, "both cut over the axis 'tensor'"),
    ],
)
def test_rules_and_meshes_that_do_not_belong_together(rules, sizes, said):
    with pytest.raises(ValueError, match=said):
        rules.check(mesh(**sizes))


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: Rules(heads=("a", "a")), ValueError, "different axes"),
        (lambda: Rules(align=0), ValueError, "align=0"),
        (lambda: Rules().check("tensor=2"), TypeError, r"expected a jax\.sharding\.Mesh"),
        (lambda: parse_mesh("tensor8"), ValueError, "could not read 'tensor8'"),
        (lambda: parse_mesh("tensor=4,tensor=2"), ValueError, r"read 'tensor=2' \(named twice\)"),
        (lambda: parse_mesh(8), TypeError, "expected a text such as 'tensor=4,expert=2', found 8"),
        (lambda: make_mesh({"tensor": 0}), ValueError, "sizes of 1 or more, found 'tensor': 0"),
        (lambda: make_mesh("tensor=2"), TypeError, "expected sizes by name"),
        (lambda: Rules(heads=3), ValueError, r"Rules\(heads=3\): expected names"),
        (
            lambda: fdq.shard(tiny(), mesh(tensor=2), {}),
            TypeError,
            r"expected fdq\.sharding\.Rules",
        ),
        (lambda: fdq.unshard({}), TypeError, r"unshard: expected a fdq\.models\.Decoder"),
        (lambda: fdq.quantize(tiny(), "W4A16", mesh_rules=Rules()), ValueError, "the mesh= too"),
        (lambda: parse_mesh("tensor=0"), ValueError, "could not read 'tensor=0'"),
        (lambda: parse_mesh("tensor=16"), ValueError, "there are 8 .*device_count=16"),
        (lambda: repeats(6, 4), ValueError, "6 KV heads over 4 devices.*Use 2 devices"),
        (lambda: fdq.shard(tiny(), abstract_mesh({"tensor": 2})), TypeError, "no devices for weig"),
        (lambda: fdq.shard({}, mesh(tensor=2)), TypeError, r"expected a fdq\.models\.Decoder"),
        (lambda: fdq.quantize({}, "W4A16", mesh=mesh(tensor=2)), TypeError, "mesh= is for"),
    ],
)
def test_wrong_arguments(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


def test_a_mesh_of_its_description():
    assert dict(parse_mesh("tensor = 4, expert=2").shape) == {"tensor": 4, "expert": 2}
    assert [repeats(*pair) for pair in ((8, 8), (8, 2), (2, 8), (1, 4))] == [1, 1, 4, 4]
