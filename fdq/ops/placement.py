"""Where the arrays of an op lie.

Kernels read arrays of one device, or of one shard. Under meshes with Explicit axes (the default of
`jax.make_mesh` since JAX 0.12) every reshape and dot must say how its result is sharded: an op says
it once, for its result, and is traced in Auto mode.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def sharded(*trees: Any) -> str | None:
    """Why arrays may lie on several devices; None where they lie on one, and in `jax.shard_map`."""
    # Arrays say which mesh they belong to: other devices and other meshes do not matter.
    current = jax.sharding.get_abstract_mesh()
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves(trees)]
    for mesh in (current, *meshes):
        if mesh.empty or all(size == 1 for size in mesh.axis_sizes):
            continue
        if not set(mesh.axis_names) <= set(current.manual_axes):
            return f"arrays may be sharded over the mesh {dict(mesh.shape)}"
    return None


def devices(*trees: Any) -> int:
    """On how many devices arrays lie; 1 where they do not say."""
    arrays = (a for a in jax.tree.leaves(trees) if isinstance(a, jax.Array))
    held = (a.sharding for a in arrays if not isinstance(a, Tracer))
    return max((len(sharding.device_set) for sharding in held), default=1)


def spec_entry(array: Any, axis: int) -> Any:
    """Mesh axes that an axis of an array (or tracer) is sharded over; None if it is not."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    spec = getattr(sharding, "spec", None)
    if spec is None:
        return None
    axis = axis % array.ndim
    return spec[axis] if axis < len(spec) else None


def spec_entries(array: Any) -> list[Any]:
    """`spec_entry` of every axis."""
    return [spec_entry(array, axis) for axis in range(array.ndim)]


def leading_axes(tree: Any, noted: tuple[str, ...] = ()) -> tuple[Any, tuple[str, ...]]:
    """Mesh and mesh axes over which the first axis of stacked arrays is sharded; (None, ()) if not.

    Arrays and tracers on Explicit axes say so themselves; tracers on Auto axes do not: of these
    axes the `noted` ones count. Axes that are manual already (`jax.shard_map`) do not.
    """
    first = jax.tree.leaves(tree)[0]
    mesh = jax.typeof(first).sharding.mesh
    entry: Any = spec_entry(first, 0) or noted
    if not isinstance(first, Tracer) and isinstance(first, jax.Array):
        held = first.sharding
        if isinstance(held, NamedSharding):
            entry = held.spec[0] if len(held.spec) else None
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    manual = jax.sharding.get_abstract_mesh().manual_axes
    known = not mesh.empty and set(names) <= set(mesh.axis_names) - set(manual)
    if not known or math.prod(mesh.shape[name] for name in names) == 1:
        return None, ()
    if first.shape[0] % math.prod(mesh.shape[name] for name in names):
        return None, ()
    return mesh, names


def in_auto_axes(
    function: Callable[..., jax.Array], *arguments: Any, result: Callable[[], list[Any]]
) -> jax.Array:
    """`function(*arguments)`, traced with Auto axes where the current mesh has Explicit ones.

    Where none is current that of the arguments counts. `result` gives the mesh axes of each axis;
    one that comes twice is kept where it is first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = _traced_mesh(arguments)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return function(*arguments)
    seen: set[str] = set()
    entries: list[Any] = []
    for entry in result():
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        names = tuple(name for name in names if name not in seen)
        seen.update(names)
        entries.append(names or None)
    sharding = NamedSharding(mesh, PartitionSpec(*entries))
    traced: Any = jax.sharding.auto_axes(function, out_sharding=sharding)
    return traced(*arguments)


@contextlib.contextmanager
def mesh_of(*trees: Any) -> Iterator[None]:
    """Inside, the mesh that arrays lie on is the current one, if it has Explicit axes and none is.

    `jax.make_mesh` makes such meshes, and arrays carry theirs along; ops ask for the current one,
    which `jax.set_mesh` sets. While tracing it is the mesh of the arrays' types.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        yield
    elif _tracing():
        mesh = _traced_mesh(trees)
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
            yield
    else:
        mesh = _explicit_mesh(trees)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            yield


def _tracing() -> bool:
    """Whether JAX is tracing or differentiating: then no mesh can be asked for or set."""
    try:
        jax.sharding.get_mesh()
    except ValueError:
        return True
    return False


def _traced_mesh(trees: Any) -> Any:
    for array in jax.tree.leaves(trees):
        mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _explicit_mesh(trees: Any) -> Any:
    for array in jax.tree.leaves(trees):
        if isinstance(array, Tracer):
            return None
        sharding = getattr(array, "sharding", None)
        if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
            return sharding.mesh
    return None


def on_current_mesh(tree: Any) -> Any:
    """`tree` with the arrays that lie on no mesh replicated over the current one, if Explicit."""
    if _tracing() or AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return tree
    current = jax.sharding.get_mesh()
    everywhere = NamedSharding(current, PartitionSpec())

    def place(array: Any) -> Any:
        placed = isinstance(array, Tracer) or isinstance(array.sharding, NamedSharding)
        return array if placed else jax.device_put(array, everywhere)

    return jax.tree.map(place, tree)
