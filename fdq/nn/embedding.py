"""Token embeddings, and the same table as the output head of a tied model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.nn.parameters import value
from fdq.ops.matmul.dense import transposed_matmul


class Embedding(nnx.Module):
    """A table `embedding [vocab, features]`, looked up by token.

    A quantized table works and is decoded whole at each use, so it saves memory at rest and no
    bandwidth; recipes leave embeddings as they are unless a rule names them.
    """

    def __init__(self, vocab_size: int, features: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (vocab_size, features), dtype) * 0.02
        self.embedding: Any = nnx.data(nnx.Param(table))

    def _table(self, dtype: Any) -> jax.Array:
        table = value(self.embedding)
        return dequantize(table, dtype) if isinstance(table, QuantizedWeight) else table

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """`tokens [...] int -> [..., features]` in `dtype`."""
        return jnp.take(self._table(dtype), tokens, axis=0, mode="clip").astype(dtype)

    def attend(self, x: jax.Array, *, out_dtype: Any = jnp.float32) -> jax.Array:
        """`x [..., features] -> x @ embedding.T [..., vocab]` in `out_dtype`."""
        return transposed_matmul(x, self._table(x.dtype), out_dtype=out_dtype)
