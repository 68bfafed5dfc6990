"""`shard`: a model on the devices of a mesh, and `unshard`, back again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from fdq.formats.qtensor import QTensor, QuantizedWeight, boxed, materialize
from fdq.models.decoder import Decoder
from fdq.nn.parameters import value
from fdq.schemes.mesh_rules import DEFAULT, Rules
from fdq.sharding import layout
from fdq.sharding.cut import Cut, placed, smaller_blocks, whole
from fdq.sharding.model_cuts import cuts_of
from fdq.sharding.placement import Placement


def shard(model: Decoder, mesh: Any, rules: Rules | None = None) -> Decoder:
    """The model on a mesh: `fdq.generate`, `prefill`, `decode`, `functional` and calls use it.

    Args:
      model: a `fdq.models.Decoder`, quantized or not, concrete or abstract; it stays as it is.
      mesh: `jax.make_mesh((4, 2), ("tensor", "expert"))`, of Explicit or Auto axes.
      rules: which axes cut what; by default `Rules()`.

    Returns:
      A model of the same arrays, cut and dealt out; `print(model.placement)` says how.

    Raises:
      TypeError: what is no Decoder, or no mesh.
      ValueError: what the mesh does not divide, naming the tensor and what to do; rules and a mesh
        that do not belong together; a model that is sharded already.
    """
    if not isinstance(model, Decoder):
        raise TypeError(
            f"shard: expected a fdq.models.Decoder, found a {type(model).__name__}. Rules know the "
            "parts of decoders; put other trees on a mesh with jax.device_put."
        )
    placement = plan(model, mesh, rules)
    if isinstance(placement.mesh, AbstractMesh) and _has_values(model):
        raise TypeError(_ABSTRACT)
    copy = nnx.merge(*nnx.split(model), copy=True)
    _replace(copy, lambda path, held: put(placement, path, held))
    copy.placement = placement
    return copy


def unshard(model: Decoder) -> Decoder:
    """A copy of a sharded model as it was before; its arrays stay on the mesh."""
    if not isinstance(model, Decoder):
        raise TypeError(f"unshard: expected a fdq.models.Decoder, found a {type(model).__name__}.")
    placement = model.placement
    if placement is None:
        return model
    copy = nnx.merge(*nnx.split(model), copy=True)
    copy.placement = None

    def undo(path: str, held: Any) -> Any:
        cut = placement.of.get(path)
        if isinstance(held, QuantizedWeight):
            held = layout.canonical(held, cut_of(path, held), placement.mesh)
        return held if cut is None else whole(held, cut, placement.mesh)

    def cut_of(path: str, held: Any) -> Cut:
        return placement.of.get(path) or Cut("whole", ((),) * held.ndim)

    with _current(placement.mesh):
        _replace(copy, undo)
    return copy


def prepare(model: Decoder) -> None:
    """Each device's part of the weights in the layout that the device wants, in place.

    As `fdq.prepare` does on one device; `fdq.load(path, mesh=)` calls it, `unshard` undoes it.
    """
    placement = model.placement
    platform = placement.mesh.devices.flat[0].platform

    def change(path: str, held: Any) -> Any:
        if not isinstance(held, QuantizedWeight):
            return held
        cut = placement.of.get(path) or Cut("whole", ((),) * held.ndim)
        return layout.prepared(held, cut, placement.mesh, platform)

    with _current(placement.mesh):
        _replace(model, change)


@contextlib.contextmanager
def _current(mesh: Any) -> Iterator[None]:
    """Inside, `mesh` is the current one where `jax.set_mesh` made another one current."""
    found = jax.sharding.get_abstract_mesh()
    other = isinstance(mesh, Mesh) and not found.empty and found != mesh.abstract_mesh
    with jax.set_mesh(mesh) if other else contextlib.nullcontext():
        yield


def plan(model: Decoder, mesh: Any, rules: Rules | None = None) -> Placement:
    """How a model would be cut; raises as `shard` does."""
    if model.placement is not None:
        raise ValueError("shard: the model is on a mesh already; fdq.sharding.unshard it first.")
    rules = DEFAULT if rules is None else rules
    if not isinstance(rules, Rules):
        raise TypeError(f"rules: expected fdq.sharding.Rules(...), found {rules!r:.100}.")
    mesh = rules.check(mesh)
    if isinstance(mesh, Mesh) and jax.process_count() > 1 and not mesh.local_devices:
        raise ValueError(
            f"mesh: process {jax.process_index()} of {jax.process_count()} has none of its "
            f"{mesh.size} devices, of {jax.device_count()} that there are. Make it over devices of "
            "all processes, such as all of them, or start fewer processes."
        )
    cuts = cuts_of(model, mesh, rules)
    return Placement(mesh, rules, tuple(cuts.found.items()), tuple(cuts.notes))


_ABSTRACT = (
    "mesh: an AbstractMesh has no devices for weights; it is for models of shapes, as "
    'fdq.models.abstract makes them. Use jax.make_mesh((8,), ("tensor",)).'
)


def _has_values(model: Decoder) -> bool:
    leaves = jax.tree.leaves(nnx.split(model)[1])
    return not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def check_devices(mesh: Any) -> None:
    """Raises TypeError for a mesh of devices that are not there, where weights are to lie."""
    if isinstance(mesh, AbstractMesh):
        raise TypeError(_ABSTRACT)


def put(placement: Placement, path: str, held: Any) -> Any:
    """One tensor where it belongs: a host array or QTensor of them, or device arrays."""
    cut = placement.of.get(path)
    if cut is None:
        count = len(held.shape) if not isinstance(held, QTensor) else held.ndim
        cut = Cut("whole", ((),) * count)
    return placed(held, cut, placement.mesh)


def parts(placement: Placement, path: str, tensor: Any) -> dict[str, Any]:
    """Shardings to which the arrays of an abstract tensor can be read before they are `put`.

    By name, `value` of what is no QTensor; those that every device has, or that are dealt out from
    other blocks than are stored, are left out.
    """
    cut = placement.of.get(path)
    return {} if cut is None else cut.parts(tensor, placement.mesh)


def settle(model: Decoder, placement: Placement) -> None:
    """Notes in a model, in place, that its tensors were `put` where they belong."""
    for keys, one in list(nnx.iter_modules(model)):
        for name, held in list(vars(one).items()):
            cut = placement.of.get(".".join([*map(str, keys), name]))
            if isinstance(held, QTensor) and cut is not None and cut.spec is not None:
                spec = smaller_blocks(cut.spec, cut.widths)
                setattr(one, name, held.replace(spec=spec))
    model.placement = placement


def _replace(module: nnx.Module, change: Callable[[str, Any], Any]) -> None:
    """Every Variable and QTensor of a module by what `change(path, arrays)` makes of it."""
    for keys, one in list(nnx.iter_modules(module)):
        for name, held in list(vars(one).items()):
            path = ".".join([*map(str, keys), name])
            if isinstance(held, QuantizedWeight):
                boxes = held.arrays()
                new = change(path, materialize(held))
                if new.layout == held.layout:
                    arrays = {n: boxes[n].replace(a) for n, a in new.arrays().items()}
                    setattr(one, name, new.replace(**arrays))
                else:
                    setattr(one, name, boxed(new))
            elif isinstance(held, nnx.Variable):
                setattr(one, name, held.replace(change(path, value(held))))
