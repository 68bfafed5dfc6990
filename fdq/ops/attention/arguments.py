"""What attention over a cache is given, and what it means."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.cache_tensor import CacheTensor
from pallas_kernels.typing import Array, Float, Int

DEFAULT_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class AttentionArguments:
    """Checked arguments of `fdq.attention`, with nothing left out; see there."""

    q: jax.Array
    k: CacheTensor
    v: CacheTensor
    lengths: jax.Array
    offset: jax.Array
    sliding_window: int | None
    scale: float
    block_size: int = DEFAULT_BLOCK


def attention_reference(
    q: Float[Array, "b t h d"],
    k: CacheTensor | Float[Array, "b kh s d"],
    v: CacheTensor | Float[Array, "b kh s d"],
    *,
    lengths: Int[Array, " b"],
    offset: Int[Array, " b"] | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Float[Array, "b t h d"]:
    """The meaning of `fdq.attention`: decode the cache, one softmax over all slots, float32."""
    t, h, d = q.shape[1:]
    keys, values = (
        a.dequantize() if isinstance(a, CacheTensor) else a.astype(jnp.float32) for a in (k, v)
    )
    keys, values = (jnp.repeat(a, h // a.shape[1], axis=1) for a in (keys, values))
    offset = lengths - t if offset is None else offset
    position = (offset[:, None] + jnp.arange(t)[None, :])[:, None, :, None]
    slot = jnp.arange(keys.shape[2])[None, None, None, :]
    visible = (slot <= position) & (slot < lengths[:, None, None, None])
    if sliding_window is not None:
        visible &= slot > position - sliding_window
    highest = lax.Precision.HIGHEST
    scores = jnp.einsum("bthd,bhsd->bhts", q.astype(jnp.float32), keys, precision=highest)
    scores = jnp.where(visible, scores * (d**-0.5 if scale is None else scale), -jnp.inf)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)
    out = jnp.einsum("bhts,bhsd->bthd", weights, values, precision=highest)
    return out.astype(q.dtype)
