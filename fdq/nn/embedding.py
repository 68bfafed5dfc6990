"""Token embeddings, and the same table as the output head of a tied model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.formats.qtensor import QuantizedWeight
from fdq.nn.parameters import value
from fdq.ops.matmul.dense import transposed_matmul
from fdq.ops.matmul.transposed import take, transposed_product


def check_vocabulary(what: str, tokens: np.ndarray, size: int) -> None:
    """ValueError for tokens that a table has no row of: a lookup would take the nearest it has."""
    if tokens.size and (tokens.min() < 0 or tokens.max() >= size):
        raise ValueError(
            f"{what} range over {tokens.min()} ... {tokens.max()}, expected 0 ... {size - 1}."
        )


def token_array(what: str, tokens: Any) -> np.ndarray:
    """Tokens as an array; ValueError where their rows differ in length."""
    try:
        return np.asarray(tokens)
    except ValueError:  # NumPy's words are about shapes
        raise ValueError(
            f"{what}: expected an array of integers, found rows of different lengths. Pad them on "
            "the right; fdq.prefill and fdq.generate take lengths= and lists of prompts."
        ) from None


class Embedding(nnx.Module):
    """A table `embedding [vocab, features]`, looked up by token.

    Of a quantized table the rows of the tokens are decoded, and as an output head a tile of rows at
    a time; recipes leave embeddings as they are unless a rule names them.

    Attributes:
      embedding: the table, an `nnx.Param` or a quantized weight.
      vocabulary_axes: mesh axes over which its rows are cut, in a shard of a model
        (`fdq.sharding`).
    """

    vocabulary_axes: tuple[str, ...] = ()

    def __init__(self, vocab_size: int, features: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (vocab_size, features), dtype) * 0.02
        self.embedding: Any = nnx.data(nnx.Param(table))

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """`tokens [...] int -> [..., features]` in `dtype`."""
        table, axes = value(self.embedding), self.vocabulary_axes
        if not axes:
            return take(table, tokens, mode="clip", dtype=dtype).astype(dtype)
        own = table.shape[0]
        tokens = tokens.astype(jnp.int32) - jax.lax.axis_index(axes).astype(jnp.int32) * own
        rows = take(table, tokens, mode="clip", dtype=dtype).astype(dtype)
        mine = ((tokens >= 0) & (tokens < own))[..., None]
        return jax.lax.psum(jnp.where(mine, rows, jnp.zeros_like(rows)), axes)

    def attend(self, x: jax.Array, *, out_dtype: Any = jnp.float32) -> jax.Array:
        """`x [..., features] -> x @ embedding.T [..., vocab]` in `out_dtype`."""
        table = value(self.embedding)
        quantized = isinstance(table, QuantizedWeight)
        return (transposed_product if quantized else transposed_matmul)(
            x, table, out_dtype=out_dtype
        )
