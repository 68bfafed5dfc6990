"""Weights whose columns are several parts, sharded over N so that a device has some of each.

Queries, keys and values are one product, and so are gate and up. Cut in two, the first device of
`q | k | v` would hold queries only, and every step would send activations around to undo that.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

from fdq.formats import row_order
from fdq.formats.qtensor import QTensor, QuantizedWeight, materialize
from fdq.ops.prepared_weight import PreparedWeight
from fdq.ops.rows import Order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InterleavedWeight(PreparedWeight):
    """Columns as `order` says; `data` is a dict of the arrays of a QTensor with such columns."""

    order: Order = dataclasses.field(kw_only=True, metadata={"static": True})

    layout = "interleaved"

    @classmethod
    def of(cls, q: QuantizedWeight, order: Order | None = None) -> Self:
        """A weight `[K, N]` with its columns in another order; each array stays sharded as it is.

        Raises:
          ValueError: without an order.
        """
        if order is None:
            raise ValueError("an interleaved weight needs an order of its columns")
        q = q.canonical()
        data = _reordered(q.arrays(), q.shape[-1], order, False)
        return cls(data, spec=q.spec, padding=q.padding, order=order)

    def canonical(self) -> QTensor:
        """The inverse of `of`, bit for bit."""
        data = _reordered(materialize(self).data, self.shape[-1], self.order, True)
        return QTensor(spec=self.spec, padding=self.padding, **data)

    @property
    def inner(self) -> QTensor:
        """The QTensor that has its columns in this order."""
        return QTensor(spec=self.spec, padding=self.padding, **materialize(self).data)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(K, N)`."""
        return self.inner.shape

    @property
    def code_dtype(self) -> Any:
        """Dtype of the codes."""
        return self.inner.code_dtype


nnx.register_data_type(InterleavedWeight)


def _reordered(arrays: dict[str, Any], n: int, order: Order, back: bool) -> dict[str, Any]:
    def moved(array: Any) -> Any:
        if not array.ndim or array.shape[-1] != n or isinstance(array, jax.ShapeDtypeStruct):
            return array
        if isinstance(array, Tracer):
            return _moved(array, order, back)
        return jax.jit(_moved, static_argnums=(1, 2), out_shardings=array.sharding)(
            array, order, back
        )

    # Of rows, not columns, however many.
    return {n: a if n == row_order.NAME else moved(a) for n, a in arrays.items()}


def _moved(array: jax.Array, order: Order, back: bool) -> jax.Array:
    held = jax.typeof(array).sharding
    explicit = AxisType.Explicit in held.mesh.axis_types
    columns = jnp.asarray(order.columns(back))
    return array.at[..., columns].get(out_sharding=held if explicit else None)


def shards_of_columns(w: Any) -> int:
    """Over how many devices the columns of a QTensor's codes are sharded."""
    codes = materialize(w).arrays()["codes"]
    sharding = getattr(codes, "sharding", None)
    if isinstance(codes, Tracer) or not isinstance(sharding, NamedSharding):
        return 1
    entry = sharding.spec[codes.ndim - 1] if len(sharding.spec) == codes.ndim else None
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return math.prod(sharding.mesh.shape[name] for name in names)


def interleave_in_place(module: nnx.Module) -> None:
    """Reorders the columns of sharded fused weights, where a module names their parts.

    Such a module has `fused_parts() -> {name of a layer: (widths, unit)}`: a shard gets whole units
    (heads) of every part, and where these cannot be dealt out evenly the weight stays as it is.
    """
    for _, one in list(nnx.iter_modules(module)):
        named = getattr(one, "fused_parts", dict)()
        for name, (parts, unit) in named.items():
            layer: Any = getattr(one, name)
            w = getattr(layer, "kernel", None)
            if not isinstance(w, QTensor) or w.ndim != 2 or w.is_abstract:
                continue
            held, _ = materialize(w).without_order()
            shards, scales = shards_of_columns(w), held.arrays().values()
            even = shards > 1 and all(part % (shards * unit) == 0 for part in parts)
            # Scales of blocks of columns cannot follow their columns.
            if not even or any(a.ndim and a.shape[-1] not in (1, w.shape[-1]) for a in scales):
                continue
            new = InterleavedWeight.of(materialize(w), Order(shards, tuple(parts)))
            box = next(a for a in w.arrays().values() if isinstance(a, nnx.Variable))
            layer.kernel = new.replace(data=box.replace(new.data))
