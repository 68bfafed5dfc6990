"""How a cache lies on a mesh: its scales are cut as the keys and values that they go with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fdq.cache.cache_tensor import CacheTensor


def parts(sharding: NamedSharding | None, heads: int) -> int:
    """Into how many parts of their own keys and values are cut; a single head is not.

    Raises:
      ValueError: what is no NamedSharding of four axes at most.
    """
    if sharding is None:
        return 1
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) > 4:
        raise ValueError(
            f"KV cache sharding: expected a NamedSharding of [batch, kv_heads, slots, head_dim], "
            f"found {sharding}."
        )
    entries = [entry for i, entry in enumerate(sharding.spec) if i != 1 or heads > 1]
    names = [name for entry in entries for name in _names(entry)]
    return math.prod(sharding.mesh.shape[name] for name in names)


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def partition(tensor: CacheTensor, *entries: Any) -> CacheTensor:
    """A CacheTensor of PartitionSpecs, from the entries of `[batch, kv_heads, slots, head_dim]`.

    An abstract one says which arrays there are.
    """
    batch, by_head, slots, channels = (*entries, *[None] * (4 - len(entries)))
    names = {"b": batch, "h": by_head, "s": slots, "d": channels, "-": None}

    def one(axes: str, array: Any) -> PartitionSpec:
        # A single head or number is not cut.
        whole = [axis in "hd" and n == 1 for axis, n in zip(axes, array.shape, strict=True)]
        return PartitionSpec(*(None if w else names[a] for a, w in zip(axes, whole, strict=True)))

    return jax.tree.map(one, tensor.axes(), tensor)


def laid_out_like[T](like: T, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, a tree of arrays as `like`, each cut as that is where sizes divide.

    For what takes slots and sequences out of caches: on Explicit axes of a mesh JAX asks how the
    results of such lie, so the function is traced with Auto axes there, whether the mesh is set or
    not.
    """
    leaves, structure = jax.tree.flatten(like)
    mesh = next(filter(None, map(_explicit_mesh, leaves)), None)
    if mesh is None:
        return function(*arguments)
    shapes = jax.eval_shape(function, *jax.tree.map(_bare, arguments))
    places = [
        NamedSharding(mesh, _dividing(one, new.shape))
        for one, new in zip(leaves, jax.tree.leaves(shapes), strict=True)
    ]
    out: Any = jax.tree.unflatten(structure, places)
    traced: Any = jax.sharding.auto_axes(function, axes=mesh.axis_names, out_sharding=out)
    return traced(*arguments)


def _explicit_mesh(array: Any) -> Any:
    """The mesh with Explicit axes that an array (or tracer) lies on; None without one."""
    mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    return mesh if isinstance(array, Tracer) else array.sharding.mesh


def _bare(array: Any) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(array)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype)


def _dividing(array: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """How an array is cut, as far as that divides another shape."""
    sharding = jax.typeof(array).sharding
    entries = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    sizes = (math.prod(sharding.mesh.shape[name] for name in _names(one)) for one in entries)
    cut = zip(entries, sizes, shape, strict=True)
    return PartitionSpec(*(None if n % size else one for one, size, n in cut))
