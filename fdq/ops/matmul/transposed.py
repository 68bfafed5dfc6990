"""Products with int8 codes that lie as `[N, K]`, for CPUs with matrix units."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fdq.ops.prepared_weight import TransposedWeight

_SPLITS = 3
# 127 * 2 * 127: a part is rounded to 1/127 of the one before, and the remainder is half a step.
_STEP = 254.0


def transposed_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 `x [M, K]` times `w [N, K]` over K -> int32 `[M, N]`.

    The weight is the left operand: the right one is repacked by the CPU's matrix kernels, and x is
    the small one. Rows are padded to two (see `padded_integer_dot`).
    """
    m = x.shape[0]
    if m == 1:
        x = jnp.concatenate([x, jnp.zeros_like(x)], axis=0)
    y = lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return y[:, :m].T


def transposed_integer_product(x: jax.Array, w: TransposedWeight) -> jax.Array:
    """int8 rows `[M, K]` times a transposed int8 weight -> float32 `[M, N]`: int32, scaled."""
    return transposed_dot(x, w.data.codes).astype(jnp.float32) * w.data.scale.astype(jnp.float32)


def transposed_split_product(x: jax.Array, w: TransposedWeight) -> jax.Array:
    """Float rows `[M, K]` times a transposed int8 weight -> float32 `[M, N]`.

    A row of x is split into three int8 rows, `x = step * (a + b / 254 + c / 254^2)` with
    `step = max|x| / 127`, so that 8-bit dots do the work and the sums are exact. What is cut off
    is at most `max|x| * 2^-24`, half a unit in the last place of the row's largest element.
    """
    m = x.shape[0]
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = jnp.where(largest == 0, jnp.float32(1), largest)
    rest = x / largest * jnp.float32(127)
    parts = []
    for _ in range(_SPLITS):
        part = jnp.round(rest)
        parts.append(part)
        rest = (rest - part) * jnp.float32(_STEP)
    sums = transposed_dot(jnp.concatenate(parts, axis=0).astype(jnp.int8), w.data.codes)
    sums = sums.astype(jnp.float32)
    y = sums[2 * m :] / jnp.float32(_STEP)
    y = (y + sums[m : 2 * m]) / jnp.float32(_STEP) + sums[:m]
    return y * (largest / jnp.float32(127)) * w.data.scale.astype(jnp.float32)
