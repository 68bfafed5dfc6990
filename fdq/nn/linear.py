"""A linear layer whose kernel is an array or a QTensor."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import ops
from fdq.nn.parameters import value
from fdq.schemes.scheme import ActivationSpec


def initial_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    """A `[..., K, N]` kernel of standard deviation `1 / sqrt(K)`."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * shape[-2] ** -0.5)


class Linear(nnx.Module):
    """`y = x @ kernel + bias` with `kernel [K, N]`, `x [..., K]` and `y [..., N]`.

    Attributes:
      kernel: `nnx.Param` of `[K, N]`, or a QTensor that stands for it.
      bias: `nnx.Param` of `[N]`, or None.
      activation: how `x` is quantized before the product; None leaves it in its dtype.
      activation_scale: float32, the calibrated scale of `x` when `activation` is static.
    """

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

    def __call__(self, x: jax.Array, *, out_dtype: Any = None) -> jax.Array:
        """`x [..., K] -> [..., N]` in `out_dtype`, by default the dtype of `x`."""
        out_dtype = x.dtype if out_dtype is None else out_dtype
        y = ops.matmul(
            x,
            value(self.kernel),
            activation=self.activation,
            activation_scale=value(self.activation_scale),
            out_dtype=out_dtype,
        )
        if self.bias is not None:
            bias = value(self.bias).astype(y.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        return y

    def partial_sums(self, x: Any) -> jax.Array:
        """Rows `x [M, K]`, see `fdq.ops.partial_product` -> float32 `[split, M, N]`, no bias."""
        return ops.partial_product(
            x,
            value(self.kernel),
            activation=self.activation,
            activation_scale=value(self.activation_scale),
        )

    def finish(self, partials: jax.Array, dtype: Any) -> jax.Array:
        """`partial_sums` added up, rounded to `dtype` and with the bias: `[M, N]`."""
        y = ops.added_up(partials).astype(dtype)
        if self.bias is not None:
            y = y + value(self.bias).astype(dtype)[None]
        return y
