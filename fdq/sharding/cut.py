"""How one tensor is cut over a mesh: which axes, and which columns go to which device."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdq import processes
from fdq.formats import row_order
from fdq.formats.qtensor import QTensor
from fdq.schemes.mesh_rules import shards
from fdq.schemes.scheme import WeightSpec

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dealt:
    """Columns that are several parts side by side: each shard gets some of each, in this order.

    Attributes:
      shards: how many.
      parts: columns of each part, of all shards together.
      unit: columns that stay together, a head.
      repeats: how often each unit of a part is held, for parts of fewer units than shards.
    """

    shards: int
    parts: tuple[int, ...]
    unit: int = 1
    repeats: tuple[int, ...] = ()

    @property
    def widths(self) -> list[int]:
        """Columns of each part that one shard has."""
        often = self.repeats or (1,) * len(self.parts)
        return [part * r // self.shards for part, r in zip(self.parts, often, strict=True)]

    def columns(self) -> np.ndarray:
        """Which column stands at each place, one shard after the other."""
        start, each = 0, []
        for part, often in zip(self.parts, self.repeats or (1,) * len(self.parts), strict=True):
            units = np.arange(start, start + part, dtype=np.int32).reshape(-1, self.unit)
            each.append(np.repeat(units, often, axis=0).reshape(self.shards, -1))
            start += part
        return np.concatenate(each, axis=1).reshape(-1)

    def places(self) -> np.ndarray:
        """Where each column stands, first."""
        return np.unique(self.columns(), return_index=True)[1].astype(np.int32)

    def of_blocks(self, width: int) -> Dealt:
        """The same for blocks of so many columns, which divides units and parts."""
        parts = tuple(part // width for part in self.parts)
        return dataclasses.replace(self, parts=parts, unit=max(1, self.unit // width))


@dataclasses.dataclass(frozen=True)
class Cut:
    """Of a tensor: the mesh axes of each of its axes, `[E,] K, N` of a weight.

    Attributes:
      kind: what is cut, for people.
      axes: of each axis.
      dealt: the order of the last axis (with `along`, of another one); None is as it is.
      along: the axis that is dealt.
      spec: of a weight whose blocks are made smaller than a shard, as checkpoints have it.
      widths: of its parts in a shard, which these smaller blocks divide.
    """

    kind: str
    axes: tuple[Axes, ...]
    dealt: Dealt | None = None
    along: int = -1
    spec: WeightSpec | None = None
    widths: tuple[int, ...] = ()

    def of_array(self, name: str, array: Any, weight: tuple[int, ...]) -> tuple[Axes, ...]:
        """Of an array of a QTensor `weight`; what is coarser than a shard is on every device."""
        if name == row_order.NAME:
            return (*self.axes[:-2], ())
        held = tuple(array.shape)
        whole = [size == 1 for size in held]
        lead = len(weight) - len(held)
        return tuple(() if one else axes for axes, one in zip(self.axes[lead:], whole, strict=True))

    def parts(self, tensor: Any, mesh: Mesh) -> dict[str, NamedSharding]:
        """Where each array can be read to, in its order of checkpoints, a part on each device."""
        if not isinstance(tensor, QTensor):
            arrays = {"value": (tensor, self.axes)}
        else:
            held = tensor.arrays().items()
            arrays = {n: (a, self.of_array(n, a, tensor.shape)) for n, a in held}
        found = {}
        for name, (array, axes) in arrays.items():
            sizes = zip(array.shape, axes, strict=True)
            divides = all(size % shards(mesh, one) == 0 for size, one in sizes)
            smaller = self.spec is not None and name != "codes"
            if any(axes) and divides and not smaller:
                found[name] = NamedSharding(mesh, partition(axes))
        return found


def partition(axes: tuple[Axes, ...]) -> PartitionSpec:
    """As JAX writes it."""
    return PartitionSpec(*map(_entry, axes))


def _entry(axes: Axes) -> Any:
    return None if not axes else axes[0] if len(axes) == 1 else axes


def placed(value: Any, cut: Cut, mesh: Mesh) -> Any:
    """A host or device array, or a QTensor, as its cut says; abstract ones too."""
    if not isinstance(value, QTensor):
        return _put(value, cut, cut.axes, mesh, cut.dealt)
    arrays, spec = {}, value.spec
    if cut.spec is not None:
        spec = smaller_blocks(cut.spec, cut.widths)
    for name, array in value.arrays().items():
        axes, dealt = cut.of_array(name, array, value.shape), None
        if name != "codes" and cut.spec is not None:
            array = _repeated(array, *_ratio(cut.spec, spec), value.shape[-1])
        if cut.dealt is not None and name != row_order.NAME and array.shape[-1] > 1:
            dealt = cut.dealt.of_blocks(value.shape[-1] // array.shape[-1])
        arrays[name] = _put(array, cut, axes, mesh, dealt)
    return value.replace(spec=spec, **arrays)


def whole(value: Any, cut: Cut, mesh: Mesh) -> Any:
    """The inverse of `placed`, bit for bit; arrays stay on their devices."""
    if not isinstance(value, QTensor):
        return _taken(value, cut, cut.axes, mesh, cut.dealt, 1)
    arrays, n = {}, value.shape[-1]
    for name, array in value.arrays().items():
        axes, dealt, step = cut.of_array(name, array, value.shape), None, 1
        if cut.dealt is not None and name != row_order.NAME and array.shape[-1] > 1:
            dealt = cut.dealt.of_blocks(n // array.shape[-1])
        if name != "codes" and cut.spec is not None:
            step = _ratio(cut.spec, value.spec)[0]
        arrays[name] = _taken(array, cut, axes, mesh, dealt, step)
    return value.replace(spec=cut.spec or value.spec, **arrays)


def _ratio(old: WeightSpec, new: WeightSpec) -> tuple[int, int]:
    assert old.block_size is not None and new.block_size is not None
    return old.block_size[1] // new.block_size[1], new.block_size[1]


def _repeated(array: Any, often: int, width: int, n: int) -> Any:
    """Scales of blocks of columns, one for each smaller block."""
    count = -(-n // width)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*array.shape[:-1], count), array.dtype)
    library: Any = np if isinstance(array, np.ndarray) else jnp
    columns = np.minimum(np.arange(count) // often, array.shape[-1] - 1)
    return library.take(array, columns, axis=-1)


def _put(array: Any, cut: Cut, axes: tuple[Axes, ...], mesh: Mesh, dealt: Dealt | None) -> Any:
    sharding = NamedSharding(mesh, partition(axes))
    columns = None if dealt is None else dealt.columns()
    along = cut.along % max(array.ndim, 1) if hasattr(array, "ndim") else 0
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = list(array.shape)
        if columns is not None:
            shape[cut.along] = len(columns)
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype, sharding=sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return processes.onto(array, sharding)
    if isinstance(array, jax.Array) and array.is_fully_addressable:
        if columns is not None:
            array = jnp.take(array, columns, axis=along)
        return processes.onto(array, sharding)
    if isinstance(array, jax.Array):  # of several processes
        if columns is None and array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        return _gathered(sharding, along)(array, columns)
    host = np.asarray(array)

    def part(index: Any) -> np.ndarray:
        if columns is None:
            return host[index]
        mine = (*index[:along], slice(None), *index[along + 1 :])
        return np.take(host[mine], columns[index[along]], axis=along)

    shape = list(host.shape)
    if columns is not None:
        shape[along] = len(columns)
    return jax.make_array_from_callback(tuple(shape), sharding, part)


def _taken(
    array: Any, cut: Cut, axes: tuple[Axes, ...], mesh: Mesh, dealt: Dealt | None, step: int
) -> Any:
    if dealt is None and step == 1:
        return array
    along = cut.along % array.ndim
    places = np.arange(array.shape[along]) if dealt is None else dealt.places()
    places = places[::step]
    divides = len(places) % shards(mesh, axes[along]) == 0
    kept = axes if divides else (*axes[:along], (), *axes[along + 1 :])
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = (*array.shape[:along], len(places), *array.shape[along + 1 :])
        return jax.ShapeDtypeStruct(shape, array.dtype)
    return _gathered(NamedSharding(mesh, partition(kept)), along)(array, places)


@functools.lru_cache(maxsize=256)
def _gathered(sharding: NamedSharding, along: int) -> Callable[..., jax.Array]:
    def gather(array: jax.Array, places: Any) -> jax.Array:
        return array if places is None else jnp.take(array, places, axis=along)

    return jax.jit(gather, out_shardings=sharding)


def smaller_blocks(spec: WeightSpec, widths: Sequence[int]) -> WeightSpec:
    """The spec whose blocks of columns are whole in parts of these widths."""
    if spec.granularity != "block" or spec.block_size is None:
        return spec
    rows, columns = spec.block_size
    return dataclasses.replace(spec, block_size=(rows, math.gcd(columns, *widths)))
