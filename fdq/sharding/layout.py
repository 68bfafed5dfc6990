"""Weights of a sharded model in the layout of kernels: what each device has, one after the other.

A kernel's words are those of one weight, and on a mesh each device has a weight of its own. The
arrays of a prepared weight are then concatenated along their first axis, a device's part each.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdq.formats import FORMATS
from fdq.formats.qtensor import QTensor, QuantizedWeight
from fdq.ops.preparation import best_layout
from fdq.ops.prepared_weight import PreparedWeight
from fdq.schemes.mesh_rules import shards
from fdq.sharding.cut import Axes, Cut, partition


def of_arrays(q: QTensor, cut: Cut) -> QTensor:
    """A QTensor of PartitionSpecs."""
    arrays = q.arrays().items()
    return q.replace(**{n: partition(cut.of_array(n, a, q.shape)) for n, a in arrays})


def of_prepared(cut: Cut) -> PartitionSpec:
    """Of every array of a weight that was prepared."""
    return partition((tuple(name for axes in cut.axes for name in axes),))


def prepared(w: QuantizedWeight, cut: Cut, mesh: Mesh, platform: str) -> QuantizedWeight:
    """A cut weight with each device's part in the layout that its platform wants."""
    if not isinstance(w, QTensor):
        return w
    own = jax.eval_shape(lambda: _local(w, cut, mesh))
    kind: type[PreparedWeight] | None = best_layout(own, platform)
    if kind is None:
        return w
    prepare = jax.jit(
        jax.shard_map(
            kind.of,
            mesh=mesh,
            in_specs=(of_arrays(w, cut),),
            out_specs=of_prepared(cut),
            check_vma=False,
        )
    )
    if not w.is_abstract:
        return prepare(w)
    where = NamedSharding(mesh, of_prepared(cut))
    return jax.tree.map(lambda a: a.update(sharding=where), jax.eval_shape(prepare, w))


def canonical(w: QuantizedWeight, cut: Cut, mesh: Mesh) -> QuantizedWeight:
    """The inverse of `prepared`, bit for bit."""
    if isinstance(w, QTensor):
        return w
    own = jax.eval_shape(lambda: _part(w, cut, mesh))
    shape = tuple(s * shards(mesh, a) for s, a in zip(own.shape, cut.axes, strict=True))
    like = QTensor(spec=w.spec, padding=w.padding, **FORMATS[w.spec.format].abstract(shape, w.spec))
    return jax.jit(
        jax.shard_map(
            lambda part: part.canonical(),
            mesh=mesh,
            in_specs=(of_prepared(cut),),
            out_specs=of_arrays(like, cut),
            check_vma=False,
        )
    )(w)


def _local(q: QTensor, cut: Cut, mesh: Mesh) -> Any:
    """Of the shapes that one device has."""

    def zeros(name: str, array: Any) -> jax.Array:
        return _zeros(array, cut.of_array(name, array, q.shape), mesh)

    return q.replace(**{name: zeros(name, array) for name, array in q.arrays().items()})


def _part(w: QuantizedWeight, cut: Cut, mesh: Mesh) -> Any:
    axes = tuple(name for one in cut.axes for name in one)
    return jax.tree.map(lambda a: _zeros(a, (axes, *[()] * (a.ndim - 1)), mesh), w)


def _zeros(array: Any, axes: tuple[Axes, ...], mesh: Mesh) -> jax.Array:
    sizes = zip(array.shape, axes, strict=True)
    return jax.numpy.zeros([size // shards(mesh, a) for size, a in sizes], array.dtype)
