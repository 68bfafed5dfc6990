"""From the product of queries, keys and values to rotated heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdq.ops.rows import Normed, Rows, as_array
from pallas_kernels.typing import Array, Float


def apply_rotary(
    x: Float[Array, "b t h d"], angles: tuple[jax.Array, jax.Array], *, interleaved: bool
) -> Float[Array, "b t h d"]:
    """Rotates `x [B, T, heads, head_dim]` by `angles`, in float32; same shape and dtype."""
    cos, sin = (a[:, :, None, :] for a in angles)
    y = x.astype(jnp.float32)
    if interleaved:
        pairs = y.reshape(*y.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
    else:
        a, b = jnp.split(y, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        y = jnp.stack([a, b], axis=-1).reshape(x.shape)
    else:
        y = jnp.concatenate([a, b], axis=-1)
    return y.astype(x.dtype)


def rotated_heads(
    qkv: Rows,
    angles: tuple[jax.Array, jax.Array],
    kv_heads: int,
    *,
    interleaved: bool,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    epsilon: float = 1e-6,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of each head, queries and keys normalized and rotated.

    Args:
      qkv: `[B, T, (H + 2 KH) D]`, queries, keys and values in this order.
      angles: cosines and sines of the positions, float32 `[B, T, D / 2]` each.
      kv_heads: KH.
      interleaved: whether channels 2i and 2i + 1 are rotated together, or i and i + D / 2.
      q_norm: `[D]`, the scale of an RMS norm of each query before the rotation, or None.
      k_norm: likewise of keys.
      epsilon: of the norms.

    Returns:
      `[B, T, H, D]`, and twice `[B, T, KH, D]`, in the dtype of qkv.
    """
    x = as_array(qkv)
    x = x.reshape(*x.shape[:2], -1, 2 * angles[0].shape[-1])
    heads = x.shape[2] - 2 * kv_heads
    q, k, v = jnp.split(x, (heads, heads + kv_heads), axis=2)
    if q_norm is not None:
        q = Normed(q, q_norm, epsilon).value()
    if k_norm is not None:
        k = Normed(k, k_norm, epsilon).value()
    q, k = (apply_rotary(a, angles, interleaved=interleaved) for a in (q, k))
    return q, k, v
