"""Rows that whoever reads them finishes: one forward pass, and nothing to launch between products.

What stands between the products of a decode step (adding up parts, a bias, a norm, a gate) would
each be a launch of its own, so a layer hands it on undone: ops accept these where they accept an
array, plain XLA calls `value`, kernels do it as they stage their rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdq.ops.gates import Gate, swiglu
from fdq.ops.placement import in_auto_axes, spec_entries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """Rows with an RMS norm to come: `x / sqrt(mean(x^2) + epsilon) * scale` over the last axis.

    `x` is `[..., K]`, `scale` `[K]`; `lead` are the leading axes of the rows where they are not
    those of x. The norm is rounded first and reshaped then: between a rounding and a conversion to
    float32 that touch, XLA drops both.
    """

    x: Any
    scale: Any
    epsilon: float = dataclasses.field(metadata={"static": True})
    lead: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., K]`."""
        *lead, width = self.x.shape
        return (*(lead if self.lead is None else self.lead), width)

    @property
    def dtype(self) -> Any:
        """Of x, and of the rows."""
        return self.x.dtype

    def value(self) -> jax.Array:
        """The rows: float32 inside, rounded to the dtype of x."""
        with jax.named_scope("norm"):
            y = self.x.astype(jnp.float32)
            y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
            scale = self.scale.astype(jnp.float32)
            y = (y * scale.reshape((1,) * (y.ndim - 1) + scale.shape)).astype(self.x.dtype)
        return y if self.lead is None else y.reshape(self.shape)

    def reshape(self, *lead: int) -> Normed:
        """The same rows with other leading axes."""
        return dataclasses.replace(self, lead=lead)


@dataclasses.dataclass(frozen=True)
class Order:
    """Columns that are several parts, dealt out to shards: some of each part, then the next shard.

    `parts` are the widths of the parts of all shards together, multiples of `shards`.
    """

    shards: int
    parts: tuple[int, ...]

    def columns(self, back: bool = False) -> np.ndarray:
        """Indices by which an array is put in this order, or with `back` is taken out of it."""
        ends = np.cumsum(self.parts)
        each = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
        dealt = np.concatenate([part.reshape(self.shards, -1) for part in each], axis=1).reshape(-1)
        return np.argsort(dealt).astype(np.int32) if back else dealt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """A product as the parts of its sum over K, which its reader adds up.

    `parts` are `[split, ..., N]`, float32 where a product made them; the sum is rounded to `dtype`,
    then the bias `[N]` is added, if there is one. Columns of the parts may come in another order:
    shape, bias and value know nothing of it.
    """

    parts: Any
    bias: Any = None
    dtype: Any = dataclasses.field(default=jnp.float32, metadata={"static": True})
    order: Order | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, array: jax.Array) -> Sums:
        """An array as a sum of one part."""
        return cls(array[None], dtype=array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., N]`."""
        return tuple(self.parts.shape[1:])

    def value(self) -> jax.Array:
        """The sum, rounded to `dtype`, plus the bias in `dtype`."""
        if self.order is not None:
            return jnp.concatenate(self.pieces(self.order.parts), axis=-1)
        return _biased(self._sum(), self.bias)

    def pieces(self, widths: Sequence[int]) -> list[jax.Array]:
        """`value()` cut on its last axis into pieces of these widths."""
        ends = list(itertools.accumulate(widths))
        if self.order is None or tuple(widths) != self.order.parts:
            return jnp.split(self.value(), ends[:-1], axis=-1)
        y, shards = self._sum(), self.order.shards

        def piece(y: jax.Array, start: int, width: int) -> jax.Array:
            """A slice of every shard: nothing moves between devices."""
            own = y.reshape(*y.shape[:-1], shards, -1)[..., start : start + width]
            return own.reshape(*y.shape[:-1], shards * width)

        pieces = []
        for end, width in zip(ends, widths, strict=True):
            cut = functools.partial(piece, start=(end - width) // shards, width=width // shards)
            one = in_auto_axes(cut, y, result=lambda: spec_entries(y))
            pieces.append(_biased(one, None if self.bias is None else self.bias[end - width : end]))
        return pieces

    def _sum(self) -> jax.Array:
        # Term by term: a reduction would be a launch of its own, additions join their reader.
        split = self.parts.shape[0]
        terms = [lax.index_in_dim(self.parts, i, keepdims=False) for i in range(split)]
        return functools.reduce(jnp.add, terms).astype(self.dtype)

    def over(self, axes: tuple[str, ...]) -> Sums:
        """Added up over the devices along mesh axes, in `jax.shard_map`; a bias is added once."""
        if not axes:
            return self
        terms = functools.reduce(jnp.add, list(self.parts))
        return dataclasses.replace(self, parts=lax.psum(terms, axes)[None])

    def reshape(self, *lead: int) -> Sums:
        """The same sums with other leading axes."""
        split, width = self.parts.shape[0], self.shape[-1]
        return dataclasses.replace(self, parts=self.parts.reshape(split, *lead, width))


def _biased(y: jax.Array, bias: Any) -> jax.Array:
    if bias is None:
        return y
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + bias.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """A gate to come, by default SwiGLU: of the sums `[..., 2 I]` of gate and up, gate first."""

    sums: Sums
    gate: Gate = dataclasses.field(default=swiglu, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., I]`."""
        *lead, width = self.sums.shape
        return (*lead, width // 2)

    @property
    def dtype(self) -> Any:
        """That gate, up and the rows are rounded to."""
        return self.sums.dtype

    def value(self) -> jax.Array:
        """`[..., I]` in `dtype`."""
        with jax.named_scope(getattr(self.gate, "__name__", "gate")):
            return self.gate(*self.sums.pieces((self.shape[-1],) * 2))

    def reshape(self, *lead: int) -> Gated:
        """The same rows with other leading axes."""
        return Gated(self.sums.reshape(*lead), self.gate)


Rows = jax.Array | Normed | Sums | Gated
"""What ops take as x."""


def as_array(rows: Rows) -> jax.Array:
    """The rows with everything done that was left to their reader."""
    return rows.value() if isinstance(rows, Normed | Sums | Gated) else rows


def flattened[R: Rows](rows: R) -> R:
    """Rows `[..., K]` as `[M, K]`."""
    if len(rows.shape) == 2:
        return rows
    count = math.prod(rows.shape[:-1])
    if isinstance(rows, Normed | Sums | Gated):
        return cast(R, rows.reshape(count))
    return cast(R, rows.reshape(count, rows.shape[-1]))
