"""Layers of Flax, and subclasses of them, that keep their class and hold a quantized weight.

A subclass may do more than its base (`nnx.LoRALinear` adds an adapter), so it is not replaced:
its class becomes one that derives from it and, behind it, from a base here. What the subclass
calls by `super()` is then the quantized product.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.nn import general
from fdq.nn.parameters import value
from fdq.ops.matmul.transposed import take, transposed_product


class LinearBase(nnx.Linear):
    """`nnx.Linear` with a QTensor as its kernel; attributes as those of `general.Quantized`."""

    kernel_dtype: str

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """As `nnx.Linear`."""
        y, bias = general.product_of(self, inputs, lambda x: x)
        return general.finish(y, bias, (1,) * (y.ndim - 1) + (-1,), out_sharding)


class EmbedBase(nnx.Embed):
    """`nnx.Embed` with a QTensor as its table, of which only rows asked for are decoded."""

    kernel_dtype: str

    def _dtype(self, *arrays: jax.Array) -> Any:
        like = jnp.zeros((), self.kernel_dtype)
        return self.promote_dtype((*arrays, like), dtype=self.dtype)[0].dtype

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """As `nnx.Embed`."""
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError("Input type must be an integer or unsigned integer.")
        rows = take(value(self.embedding), inputs, dtype=self._dtype())
        return general.finish(rows, None, None, out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """As `nnx.Embed`."""
        dtype = self._dtype(query)
        y = transposed_product(query.astype(dtype), value(self.embedding))
        return general.finish(y, None, None, out_sharding)


class ToNNXBase(nnx.bridge.ToNNX):
    """`nnx.bridge.ToNNX` with QTensors among its params, decoded at each call as by `fdq.linen`."""

    def __call__(self, *args: Any, mutable: Any = None, **kwargs: Any) -> Any:
        """As `nnx.bridge.ToNNX`, without mutable collections."""
        if mutable:
            raise NotImplementedError(
                "A quantized ToNNX has no mutable collections; use fdq.linen.apply(module, ...)."
            )
        kept = {
            name: held
            for name, held in vars(self).items()
            if not name.startswith(("_pytree__", "to_nnx__"))
        }
        vars(self).update({name: _decoded(held) for name, held in kept.items()})
        try:
            return super().__call__(*args, **kwargs)
        finally:
            vars(self).update(kept)


def _decoded(held: Any) -> Any:
    if isinstance(held, dict):
        return {name: _decoded(one) for name, one in held.items()}
    return nnx.Param(dequantize(value(held))) if isinstance(held, QuantizedWeight) else held


@functools.cache
def holding(kind: type, base: type) -> type:
    """A class like `kind` whose instances hold quantized weights as `base` does."""
    bases = (kind, base) if kind is not base.__bases__[0] else (base,)
    return types.new_class(f"Quantized{kind.__name__}", bases)
