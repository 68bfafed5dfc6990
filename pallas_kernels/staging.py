"""What a matrix kernel's x may be, and how its rows come into shared memory.

A decode step is a chain of small products. What XLA would do between two of them (a norm, an
activation, the sum of partial products) costs it one to three launches each; here the kernel that
reads the result does it while it stages its x.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.launch import THREADS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """Rows that are normalized on their way in: ``x / sqrt(mean(x^2) + epsilon) * scale``.

    Attributes:
      x: ``[M, K]``, any float dtype; results are rounded to it.
      scale: ``[K]``.
      epsilon: added to the mean square.
    """

    x: Any
    scale: Any
    epsilon: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        return tuple(self.x.shape)

    @property
    def dtype(self) -> Any:
        """Of x, and of the rows."""
        return self.x.dtype

    def value(self) -> jax.Array:
        """The rows, in plain JAX: float32 inside, rounded to the dtype of x."""
        y = self.x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale.astype(jnp.float32)[None, :]).astype(self.x.dtype)


def inverse_root_mean_square(x_ref: Any, row: Any, features: int, epsilon: float) -> jax.Array:
    """float32 scalar ``1 / sqrt(mean(x[row]^2) + epsilon)``; the row's width is whole.

    Args:
      x_ref: ``[M, W]``, W a multiple of 128, zeros beyond ``features``.
      row: of x_ref.
      features: K, that the sum is divided by.
      epsilon: added to the mean.
    """
    width = x_ref.shape[-1]

    def add(chunk, total):
        y = x_ref[row, pl.ds(pl.multiple_of(chunk * THREADS, THREADS), THREADS)]
        y = y.astype(jnp.float32)
        return total + y * y

    zero = jnp.zeros((THREADS,), jnp.float32)
    squares = lax.fori_loop(0, width // THREADS, add, zero)
    mean = jnp.sum(squares) * jnp.float32(1 / features)
    return lax.rsqrt(mean + jnp.float32(epsilon))


def normed_chunk(normed_refs: Any, row: Any, first: Any, factor: jax.Array) -> jax.Array:
    """float32 ``[128]`` of a row of `Normed`, rounded to the dtype of x.

    Args:
      normed_refs: refs of x ``[M, W]`` and scale ``[W]``.
      row: of x.
      first: first of the 128 columns, a multiple of 128.
      factor: from `inverse_root_mean_square`.
    """
    x_ref, scale_ref = normed_refs
    columns = pl.ds(pl.multiple_of(first, THREADS), THREADS)
    x = x_ref[row, columns]
    y = x.astype(jnp.float32) * factor * scale_ref[columns].astype(jnp.float32)
    return y.astype(x.dtype).astype(jnp.float32)


def whole(a: jax.Array, axis: int = -1) -> jax.Array:
    """``a`` with zeros after ``axis`` up to a multiple of 128; as it is where it is whole."""
    missing = -a.shape[axis] % THREADS
    if not missing:
        return a
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, missing)
    return jnp.pad(a, pad)
