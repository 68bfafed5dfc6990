"""A linear layer whose kernel is an array or a quantized weight."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.nn.handing_on import takes_rows
from fdq.nn.parameters import value
from fdq.ops.matmul.api import product
from fdq.ops.matmul.product import Product
from fdq.ops.rows import Rows, Sums, as_array
from fdq.schemes.scheme import ActivationSpec


def initial_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    """A `[..., K, N]` kernel of standard deviation `1 / sqrt(K)`."""
    return nnx.Param(_scaled_normal(rngs.params(), shape, jnp.dtype(dtype)))


# Compiled, and where a model is only described traced, once for all kernels of a shape.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _scaled_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5


class Linear(nnx.Module):
    """`y = x @ kernel + bias` with `kernel [K, N]`, `x [..., K]` and `y [..., N]`.

    Attributes:
      kernel: `nnx.Param` of `[K, N]`, or a quantized weight that stands for it.
      bias: `nnx.Param` of `[N]`, or None.
      activation: how `x` is quantized before the product; None leaves it in its dtype.
      activation_scale: float32, the calibrated scale of `x` when `activation` is static.
      observer: called with `x` as an array, and its `output` with the result; for calibration.
      sum_axes: mesh axes over which rows of the kernel are cut, in a shard of a model
        (`fdq.sharding`): the devices along them have a part of the sum each.
    """

    sum_axes: tuple[str, ...] = ()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel: Any = nnx.data(initial_kernel(rngs, (in_features, out_features), dtype))
        bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None
        self.bias: Any = nnx.data(bias)
        self.activation: ActivationSpec | None = None
        self.activation_scale: Any = nnx.data(None)
        self.observer: Any = nnx.data(None)

    @overload
    def __call__(self, x: Rows, *, out_dtype: Any = None, summed: Literal[True] = True) -> Any: ...
    @overload
    def __call__(self, x: Rows, *, out_dtype: Any = None, summed: Literal[False]) -> Sums: ...

    @takes_rows
    def __call__(self, x: Rows, *, out_dtype: Any = None, summed: bool = True) -> jax.Array | Sums:
        """`x [..., K] -> [..., N]` in `out_dtype`, by default that of `x`.

        `summed=False` leaves the sum and the bias to whoever reads the result.
        """
        sums = product(self.arguments(x, out_dtype)).over(self.sum_axes)
        if self.observer is not None:
            sums = Sums.of(self.observer.output(sums.value()))
        return sums.value() if summed else sums

    def arguments(self, x: Rows, out_dtype: Any = None) -> Product:
        """Of the op that computes the layer."""
        if self.observer is not None:
            self.observer(as_array(x))
        w, scale, bias = value(self.kernel), value(self.activation_scale), value(self.bias)
        dtype = x.dtype if out_dtype is None else out_dtype
        return Product(x, w, self.activation, scale, bias, dtype)
