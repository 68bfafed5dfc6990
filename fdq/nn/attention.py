"""Grouped-query self-attention, over a whole sequence or over a KV cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.cache.cache_tensor import CacheTensor
from fdq.cache.kv_cache import LayerCache
from fdq.nn.caching import Caching
from fdq.nn.handing_on import sums_of, takes_rows
from fdq.nn.linear import Linear
from fdq.nn.norm import RMSNorm
from fdq.nn.parameters import value
from fdq.ops.attention.api import attention
from fdq.ops.attention.xla import softcapped, softmax_beside
from fdq.ops.rope_append.api import rope_append
from fdq.ops.rope_append.ring import unrolled, write_ring
from fdq.ops.rope_append.xla import rotated_heads
from fdq.ops.rows import Rows
from pallas_kernels.typing import Array, Float

_MASKED = -1e30  # as a score: its weight is exactly 0, as each position sees itself

# Rows of queries whose scores are in memory at once, in attention over a whole sequence: so many,
# or as many as have so many scores (1 GB in float32), but not too few for a product.
QUERY_BLOCK, _MOST_SCORES, _FEWEST_ROWS = 1024, 2**28, 32


def causal_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t kv_heads d"],
    v: Float[Array, "b t kv_heads width"],
    *,
    sliding_window: int | None = None,
    scale: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "b t heads width"]:
    """Softmax attention of every position to itself and those before it; differentiable.

    Head `h` attends to KV head `h // (heads / kv_heads)`. The dtype is that of `q`; scores and
    softmax are float32. `sliding_window` counts the positions that each sees, its own included;
    `scale`, `sinks` and `softcap` are as in `fdq.attention`.
    """
    b, t, heads, d = q.shape
    kv_heads, width = v.shape[2:]
    factor = d**-0.5 if scale is None else scale
    q = q.reshape(b, t, kv_heads, heads // kv_heads, d)
    highest = jax.lax.Precision.HIGHEST

    def block(rows: jax.Array, first: jax.Array | int) -> jax.Array:
        """Attention of the query rows [B, R, KH, G, D] whose positions begin at `first`."""
        scores = jnp.einsum(
            "brhgd,bshd->bhgrs", rows, k, precision=highest, preferred_element_type=jnp.float32
        )
        position = first + jnp.arange(rows.shape[1])
        visible = jnp.arange(t)[None, :] <= position[:, None]
        if sliding_window is not None:
            visible &= jnp.arange(t)[None, :] > position[:, None] - sliding_window
        # Finite, as jax_debug_infs would stop at an infinity that is meant.
        scores = softcapped(scores * factor, softcap)
        scores = jnp.where(visible[None, None, None], scores, jnp.float32(_MASKED))
        column = None if sinks is None else sinks.reshape(1, kv_heads, -1, 1, 1)
        weights = softmax_beside(scores, column).astype(v.dtype)
        return jnp.einsum(
            "bhgrs,bshd->brhgd", weights, v, precision=highest, preferred_element_type=jnp.float32
        ).astype(rows.dtype)

    if not isinstance(t, int):  # a symbol, in an export for any length
        return block(q, 0).reshape(b, t, heads, width)
    size = QUERY_BLOCK
    if isinstance(b, int) and b * heads * t:
        size = max(min(size, _MOST_SCORES // (b * heads * t)), _FEWEST_ROWS)
    if t <= size:
        return block(q, 0).reshape(b, t, heads, width)
    count = -(-t // size)
    padded = jnp.pad(q, ((0, 0), (0, count * size - t), (0, 0), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(b, count, size, *q.shape[2:]), 1, 0)
    firsts = jnp.arange(count) * size
    out = jax.lax.map(lambda args: jax.checkpoint(block)(*args), (blocks, firsts))
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, heads, width)[:, :t]


class Attention(Caching):
    """Self-attention with rotary positions, optional biases and optional norms of q and k.

    Attributes:
      qkv_proj: `Linear` to q | k | v, fused on N in this order.
      o_proj: `Linear` back to the hidden size.
      q_norm, k_norm: `RMSNorm` over head_dim before the rotation (Qwen3), or None.
      sinks: `nnx.Param` of `[num_heads]`, see `fdq.attention`, or None.
      sliding_window: positions that a query sees, its own included; None for all before it.
      scale: multiplies the scores; None for `head_dim ** -0.5`.
      softcap: of the scores, see `fdq.attention`; None for none.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        interleaved: bool = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_epsilon: float | None = None,
        norm_dtype: Any = None,
        sinks: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        width = (num_heads + 2 * num_kv_heads) * head_dim
        self.qkv_proj = Linear(hidden_size, width, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(
            num_heads * head_dim, hidden_size, use_bias=output_bias, dtype=dtype, rngs=rngs
        )
        q_norm = k_norm = None
        if qk_norm_epsilon is not None:
            q_norm = RMSNorm(head_dim, epsilon=qk_norm_epsilon, dtype=norm_dtype or dtype)
            k_norm = RMSNorm(head_dim, epsilon=qk_norm_epsilon, dtype=norm_dtype or dtype)
        self.q_norm: Any = nnx.data(q_norm)
        self.k_norm: Any = nnx.data(k_norm)
        self.sinks: Any = nnx.data(nnx.Param(jnp.zeros((num_heads,), dtype)) if sinks else None)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.interleaved = interleaved
        self.sliding_window = sliding_window
        self.scale = scale
        self.softcap = softcap

    @property
    def stored(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and channels of the keys and of the values that a cache has of a token."""
        keys = self.num_kv_heads, self.head_dim
        return keys, keys

    def fused_parts(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Of fused layers, the widths of their parts, and columns that stay together: a head."""
        d = self.head_dim
        return {"qkv_proj": ((self.num_heads * d, *[self.num_kv_heads * d] * 2), d)}

    @takes_rows
    def __call__(
        self,
        x: Rows,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache | None = None,
        *,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends from `x` to itself, or to all that `cache` holds after `x` is written to it.

        Args:
          x: [B, T, H].
          angles: cosines and sines of the positions of `x`, from `rotary_angles`.
          cache: what this layer has stored; None attends causally within `x`.
          start: slot of the cache that the first of the T positions goes to: a scalar, or [B].

        Returns:
          [B, T, H] in the dtype of `x`, and the updated cache.
        """
        b, t, _ = x.shape
        with jax.named_scope("qkv_proj"):
            qkv = sums_of(self.qkv_proj, x)
        seen: dict[str, Any] = {"sliding_window": self.sliding_window, "scale": self.scale}
        seen |= {"sinks": value(self.sinks), "softcap": self.softcap}
        settings: dict[str, Any] = {"interleaved": self.interleaved}
        if self.q_norm is not None:
            settings["epsilon"] = self.q_norm.epsilon
            settings |= {"q_norm": value(self.q_norm.scale), "k_norm": value(self.k_norm.scale)}
        ring = False
        if cache is not None and cache.k.window is not None:
            ring = t > 1 or cache.k.ends is not None
        if cache is None or ring or self.kv_observer is not None:
            with jax.named_scope("rotary"):
                q, k, v = rotated_heads(
                    qkv, angles, self.num_kv_heads, head_dim=self.head_dim, **settings
                )
            if self.kv_observer is not None:
                self.kv_observer(k, v)
            if cache is None:
                with jax.named_scope("attention"):
                    y = causal_attention(q, k, v, **seen)
                with jax.named_scope("o_proj"):
                    return self.o_proj(y.reshape(b, t, -1)), None
        if start is None:
            raise ValueError("attention over a cache needs start, the first slot to write")
        offset = jnp.broadcast_to(start, (b,)).astype(jnp.int32)
        if ring:
            y, pair = _through_rings(q, k, v, cache, offset, seen)
        else:
            # Write first, then attend: reading the old cache beside the new one copies it.
            q, *pair = rope_append(qkv, angles, *cache, start, **settings)
            y = attention(q, *pair, lengths=offset + t, offset=offset, **seen)
        with jax.named_scope("o_proj"):
            return self.o_proj(y.reshape(b, t, -1)), LayerCache(*pair).settled()


def _through_rings(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, first: jax.Array, seen: Any
) -> tuple[jax.Array, list[CacheTensor]]:
    """Attention `[B, T, H, D]` of several tokens from `first [B]` on, and the rings with them.

    The last of them may take the slots of what the first still see, so that is laid out first.
    """
    new = [side.encode(x.swapaxes(1, 2)) for side, x in zip(cache, (k, v), strict=True)]
    pairs = list(zip(cache, new, strict=True))
    rows, before = zip(*(unrolled(ring, x, first) for ring, x in pairs), strict=True)
    y = attention(q, *rows, lengths=before[0] + q.shape[1], offset=before[0], **seen)
    with jax.named_scope("append"):
        return y, [write_ring(ring, x, first, ring.ends) for ring, x in pairs]
