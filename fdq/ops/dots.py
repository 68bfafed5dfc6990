"""Dots of XLA's: in float32, and of float rows with int8 weights, exactly.

On CPUs an 8-bit dot takes a fraction of the time of a float32 one, and repacks its right operand at
every call: the weight has to be its left one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

SPLITS = 3  # int8 or bfloat16 rows that a float row is split into
# 127 * 2 * 127: a part is rounded to 1/127 of the one before, and the remainder is half a step.
_STEP = 254.0


def exact_dot(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """`x [M, K]` times w over its `axis` of K, summed in float32; no float32 is rounded to TF32.

    Two operands of float64 are summed in it.
    """
    wide = x.dtype == w.dtype == jnp.float64
    return lax.dot_general(
        x,
        w,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float64 if wide else jnp.float32,
    )


def left_dot(w: jax.Array, x: jax.Array) -> jax.Array:
    """int8 `w [N, K]` times `x [M, K]` -> int32 `[M, N]`, the weight on the left.

    With one row XLA has no vector instructions: there are two then.
    """
    m = x.shape[0]
    if m == 1:
        x = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
    y = lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    # XLA takes the transpose into the dot, and the weight to the right, if it sees both.
    return lax.optimization_barrier(y)[:, :m].T


def split_rows(x: jax.Array, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """Float rows `[..., M, K]` as three times as many int8 ones along `axis`, and `[..., 1]` steps.

    `x = step * (a + b / 254 + c / 254^2)` with `step = max|x| / 127`; what is cut off is at most
    `max|x| * 2^-24`.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = jnp.where(largest == 0, jnp.float32(1), largest)
    rest = x / largest * jnp.float32(127)
    parts = []
    for _ in range(SPLITS):
        parts.append(jnp.round(rest))
        rest = (rest - parts[-1]) * jnp.float32(_STEP)
    rows = jnp.concatenate(parts, axis=axis).astype(jnp.int8)
    return rows, largest / jnp.float32(127)


def join_rows(sums: jax.Array, axis: int = 0) -> jax.Array:
    """The products of `split_rows`' rows with anything, brought together, before the step."""
    first, *rest = jnp.split(sums.astype(jnp.float32), SPLITS, axis=axis)
    low = jnp.zeros_like(first)
    for part in reversed(rest):
        low = (low + part) / jnp.float32(_STEP)
    return first + low


def split_bfloat16(x: jax.Array, axis: int = 0) -> tuple[jax.Array, None]:
    """Float rows as three times as many bfloat16 ones along `axis`, whose sums they are."""
    rest, parts = x.astype(jnp.float32), []
    for _ in range(SPLITS):
        # Not merged by XLA into the conversion back: what is left would be nothing.
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    return jnp.concatenate(parts, axis=axis).astype(jnp.bfloat16), None


def join_bfloat16(sums: jax.Array, axis: int = 0) -> jax.Array:
    """The products of `split_bfloat16`'s rows with anything, brought together."""
    first, *rest = jnp.split(sums, SPLITS, axis=axis)
    return first + functools.reduce(jnp.add, reversed(rest))


# Sums at once in an element-wise fusion: of one alone, each term waits for the one before.
_CHAINS = 4


def sum_in_chains(terms: list[jax.Array]) -> jax.Array:
    """The sum of products, for one element-wise fusion: as a few sums that do not wait in turn."""
    chains = [functools.reduce(jnp.add, terms[i::_CHAINS]) for i in range(min(_CHAINS, len(terms)))]
    while len(chains) > 1:
        chains = [functools.reduce(jnp.add, chains[i : i + 2]) for i in range(0, len(chains), 2)]
    return chains[0]
