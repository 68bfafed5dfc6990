"""Which axes of a kernel are contracted, and how it becomes a matrix `[..., K, N]` and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Fold:
    """How the last ``len(order)`` axes of a kernel become ``[K, N]``: first the contracted ones."""

    order: tuple[int, ...]
    contracted: int

    @classmethod
    def of(cls, ndim: int, contract: tuple[int, ...], stacked: int = 0) -> Fold:
        """Of a kernel whose axes `contract` are summed over; the first `stacked` are a stack.

        Raises:
          ValueError: there are no such axes, or no others are left.
        """
        axes = tuple(sorted(axis + ndim if axis < 0 else axis for axis in contract))
        others = tuple(axis for axis in range(stacked, ndim) if axis not in axes)
        inside = all(stacked <= axis < ndim for axis in axes) and len(set(axes)) == len(axes)
        if not (axes and others and inside):
            raise ValueError(
                f"contract={contract} and stacked={stacked} do not fit {ndim} axes: each "
                "contracted axis is there once, after the stacked ones, and at least one is left."
            )
        return cls(tuple(axis - stacked for axis in (*axes, *others)), len(axes))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a kernel -> shape of the folded one."""
        lead = len(shape) - len(self.order)
        sizes = [shape[lead + axis] for axis in self.order]
        k, n = math.prod(sizes[: self.contracted]), math.prod(sizes[self.contracted :])
        return (*shape[:lead], k, n)

    def __call__(self, kernel: Any) -> Any:
        """The folded kernel; a ShapeDtypeStruct gives one."""
        folded = self.shape(tuple(kernel.shape))
        if isinstance(kernel, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(folded, kernel.dtype)
        lead = kernel.ndim - len(self.order)
        axes = (*range(lead), *(lead + axis for axis in self.order))
        if axes != tuple(range(kernel.ndim)):
            kernel = jnp.transpose(kernel, axes)
        return kernel.reshape(folded)

    def unfolded(self, matrix: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
        """The inverse: `[..., K, N]` -> `[..., *sizes]`, those of the folded axes."""
        lead = matrix.ndim - 2
        kernel = matrix.reshape(*matrix.shape[:-2], *(sizes[axis] for axis in self.order))
        back = [self.order.index(axis) for axis in range(len(self.order))]
        return jnp.transpose(kernel, (*range(lead), *(lead + axis for axis in back)))


PLAIN = Fold((0, 1), 1)
