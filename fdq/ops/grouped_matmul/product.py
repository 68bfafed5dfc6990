"""The arguments of a product with picked experts, and what its implementations are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats.qtensor import QuantizedWeight, materialize
from fdq.ops.implementation import Implementation
from fdq.ops.matmul.product import Product
from fdq.ops.rows import Rows, Sums
from fdq.schemes.scheme import ActivationSpec


@dataclasses.dataclass(frozen=True, eq=False)
class GroupedProduct:
    """`x[t] @ w[index[t, p]]` of each row and pick.

    Attributes:
      x: rows `[..., K]`.
      w: `[E, K, N]`: an array, a QTensor or a prepared weight.
      index: int32 `[...]`, the expert of each row, or `[..., picks]`, all of a row.
      activation: as in `Product`.
      activation_scale: one for all experts, or `[E]`.
      beside: another product, of a weight that is not picked (shared experts), which one launch
        may take along.
      dtype: of the result.
      path: name of the layer, used only in errors.
    """

    x: Rows
    w: Any
    index: jax.Array
    activation: ActivationSpec | None = None
    activation_scale: jax.Array | None = None
    beside: Product | None = None
    dtype: Any = jnp.float32
    path: str = "<array>"

    def __post_init__(self):
        """Checks shapes; takes the arrays out of Variables."""
        w = materialize(self.w) if isinstance(self.w, QuantizedWeight) else self.w
        object.__setattr__(self, "w", w)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.activation_scale is not None:
            object.__setattr__(self, "activation_scale", jnp.asarray(self.activation_scale))
        x, shape = tuple(self.x.shape), tuple(w.shape)
        if len(shape) != 3 or len(x) < 2 or x[-1] != shape[1]:
            raise ValueError(
                f"{self.path}: grouped_matmul expects x [T, K] and w [E, K, N], found x {x} "
                f"and w {shape}."
            )
        lead, index = x[:-1], tuple(self.index.shape)
        if lead not in (index, index[:-1]):
            raise ValueError(
                f"{self.path}: expected one expert a row, [{', '.join(map(str, lead))}], or "
                f"several, found {index}."
            )
        object.__setattr__(self, "index", self.index.astype(jnp.int32))

    @property
    def rows(self) -> int:
        """Rows of x."""
        return math.prod(self.x.shape[:-1])

    @property
    def picks(self) -> int:
        """Experts of a row of x."""
        return self.index.shape[-1] if self.index.ndim == len(self.x.shape) else 1

    @property
    def tokens(self) -> int:
        """Rows that the experts were picked for: the first axis of the index."""
        return self.index.shape[0]


class GroupedImplementation(Implementation[GroupedProduct]):
    """Returns float32 parts `[split, *index.shape, N]`, with `beside` also those of that."""

    def joins(self, arguments: GroupedProduct) -> bool:
        """Whether it computes `beside` too; otherwise it is called without."""
        del arguments
        return False

    def combine(self, sums: Sums, weights: jax.Array) -> jax.Array:
        """The sum over picks, weighted: `[T, picks, N]` with weights `[T, picks]` -> `[T, N]`."""
        return combined(sums, weights)


def combined(sums: Sums, weights: jax.Array) -> jax.Array:
    """`sum_p weights[t, p] * y[t, p]` of rounded products, summed in float32 and rounded."""
    y = sums.value().astype(jnp.float32)
    return (y * weights[..., None]).sum(axis=-2).astype(sums.dtype)
