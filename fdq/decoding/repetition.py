"""A penalty on tokens that a text has already."""

from typing import Any

import jax
import jax.numpy as jnp

from fdq.decoding.state import DecodeState
from pallas_kernels.typing import Array, Float


def repetition_penalty(penalty: float) -> Any:
    """A `logits_processor` that makes tokens of the prompt and the answer less likely (above 1).

    Source: Keskar et al. 2019, https://arxiv.org/abs/1909.05858, as transformers has it: positive
    logits are divided by the penalty, negative ones multiplied, once however often a token came.
    """
    # An argument of what is compiled: another penalty compiles nothing.
    return jax.tree_util.Partial(penalized, jnp.float32(penalty))


def penalized(
    penalty: jax.Array, logits: Float[Array, "b vocab"], state: DecodeState
) -> Float[Array, "b vocab"]:
    """Logits of tokens that `state` knows, changed by `penalty`, a float32 scalar."""
    b, vocabulary = logits.shape
    known = jnp.arange(state.capacity, dtype=jnp.int32)[None] < state.length[:, None]
    # What is not known yet is written beyond the end, where it is dropped.
    at = jnp.where(known, state.tokens, vocabulary)
    seen = jnp.zeros((b, vocabulary), bool).at[jnp.arange(b)[:, None], at].set(True, mode="drop")
    changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, changed, logits)
