"""The arguments of a product with picked experts, and what its implementations are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.implementation import Implementation
from fdq.ops.indices import as_indices
from fdq.ops.matmul.product import Product
from fdq.ops.rows import Sums, as_array, flattened


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GroupedProduct(Product):
    """`x[t] @ w[index[t, p]]` of each row and pick: see `fdq.grouped_matmul`.

    The bias is `[E, N]`, one an expert; `grouped_product` adds it, not its implementations. One
    launch may take along the product `beside`, of a weight that is not picked. `axes` are the mesh
    axes over which experts are known to be sharded. In a `shard` of them, rows with the index E are
    of none of these: what is returned for them does not count.
    """

    index: jax.Array
    beside: Product | None = None
    axes: tuple[str, ...] = ()
    shard: bool = False

    def __post_init__(self):
        """Also takes the experts as int32."""
        vars(self).update(index=as_indices(self.index, f"{self.path}: expert_index"))
        super().__post_init__()

    def _check(self, x: tuple[int, ...], w: tuple[int, ...]) -> None:
        if len(w) != 3 or len(x) < 2 or x[-1] != w[1]:
            raise ValueError(
                f"{self.path}: grouped_matmul expects x [T, K] and w [E, K, N], found x {x} "
                f"and w {w}."
            )
        if self.bias is not None and tuple(self.bias.shape) != (w[0], w[2]):
            raise ValueError(
                f"{self.path}: expected a bias [{w[0]}, {w[2]}], found {tuple(self.bias.shape)}."
            )
        lead, index = x[:-1], tuple(self.index.shape)
        if lead not in (index, index[:-1]):
            rows = ", ".join(map(str, lead))
            raise ValueError(
                f"{self.path}: expected one expert a row, [{rows}], or several, found {index}."
            )

    @property
    def picks(self) -> int:
        """Experts of a row of x."""
        return self.index.shape[-1] if self.index.ndim == len(self.x.shape) else 1

    @property
    def tokens(self) -> int:
        """Rows that the experts were picked for: the first axis of the index."""
        return self.index.shape[0]


def scale_each(a: GroupedProduct) -> str | None:
    """Why kernels, which quantize all rows at once, do not take its activation scales."""
    if a.activation_scale is not None and a.activation_scale.size != 1:
        return "activations have one scale for all experts"
    return None


def quantized_rows(a: GroupedProduct, codes_dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Quantized rows `[T, K]`, and what the product of each pick is to be multiplied by, `[P, 1]`.

    They are codes, which `codes_dtype` holds exactly; with scales of groups, which no product can
    be multiplied by, they are values in the dtype of x, and the second is None.
    """
    assert a.activation is not None
    x = flattened(as_array(a.x))
    codes, scale = quantize_activation(x, a.activation, a.activation_scale, path=a.path)
    if a.activation.granularity == "token_group":
        return activation_values(codes, scale, a.activation.group_size, a.x.dtype), None
    scale = jnp.broadcast_to(scale, (codes.shape[0], 1))
    scale = jnp.repeat(scale, a.picks, axis=0, total_repeat_length=a.index.size)
    return codes.astype(codes_dtype), scale


class GroupedImplementation(Implementation[GroupedProduct]):
    """Returns float32 parts `[split, *index.shape, N]`, with `beside` also those of that."""

    def joins(self, arguments: GroupedProduct) -> bool:
        """Whether it computes `beside` too; otherwise it is called without."""
        return False

    def combine(self, sums: Sums, weights: jax.Array) -> jax.Array:
        """The sum over picks, weighted: `[T, picks, N]` with weights `[T, picks]` -> `[T, N]`."""
        return combined(sums, weights)


def combined(sums: Sums, weights: jax.Array) -> jax.Array:
    """`sum_p weights[t, p] * y[t, p]` of rounded products, summed in float32 and rounded."""
    y = sums.value().astype(jnp.float32)
    return (y * weights[..., None]).sum(axis=-2).astype(sums.dtype)
