"""Multi-head latent attention: keys and values that one small latent makes (arXiv 2405.04434)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.cache.cache_tensor import CacheTensor
from fdq.cache.kv_cache import LayerCache
from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.nn.attention import causal_attention
from fdq.nn.caching import Caching
from fdq.nn.handing_on import reads_rows, sums_of, takes_rows
from fdq.nn.linear import Linear
from fdq.nn.norm import RMSNorm, normed
from fdq.nn.parameters import value
from fdq.ops.attention.api import attention
from fdq.ops.attention.joined import JoinedKeys
from fdq.ops.placement import in_auto_axes, spec_entries
from fdq.ops.rope_append.xla import apply_rotary, write_slots
from fdq.ops.rows import Rows


class LatentAttention(Caching):
    """Self-attention whose keys and values are products of one latent vector a token.

    Of a head's query and key the first `nope_dim` channels are not rotated, the next `rope_dim`
    are; those of keys are the same for all heads. A cache holds the latent, after its norm, and the
    rotated channels: `rank + rope_dim` numbers a token instead of keys and values of every head.

    Over a cache `kv_b_proj` is not applied to what is stored: its half for keys is multiplied into
    the queries, its half for values into what attention makes of the latents. A quantized kernel is
    decoded for that, whole and in the dtype of activations, at each call or before the loop of
    `fdq.decode` (`settle`), and its input is not quantized, whatever its scheme says of
    activations. Where a module of somebody else's stands in
    its place, keys and values of the whole cache are made at each call.

    Attributes:
      q_proj: `Linear` to the queries of all heads; None with a latent of queries.
      q_a_proj, q_a_layernorm, q_b_proj: to that latent, its norm, and on; None without one.
      kv_a_proj_with_mqa: `Linear` to the latent and the channels of keys that are rotated.
      kv_a_layernorm: `RMSNorm` of the latent.
      kv_b_proj: `Linear` from the latent to keys and values of all heads, head by head.
      o_proj: `Linear` back to the hidden size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        query_rank: int | None,
        rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        scale: float | None = None,
        interleaved: bool = True,
        latent_bias: bool = False,
        output_bias: bool = False,
        epsilon: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`scale` multiplies the scores; `latent_bias` is of the products that make latents."""
        super().__init__()

        def linear(k: int, n: int, bias: bool = False) -> Linear:
            return Linear(k, n, use_bias=bias, dtype=dtype, rngs=rngs)

        queries = num_heads * (nope_dim + rope_dim)
        q_proj = q_a_proj = q_a_layernorm = q_b_proj = None
        if query_rank is None:
            q_proj = linear(hidden_size, queries)
        else:
            q_a_proj = linear(hidden_size, query_rank, latent_bias)
            q_a_layernorm = RMSNorm(query_rank, epsilon=epsilon, dtype=dtype)
            q_b_proj = linear(query_rank, queries)
        self.q_proj: Any = nnx.data(q_proj)
        self.q_a_proj: Any = nnx.data(q_a_proj)
        self.q_a_layernorm: Any = nnx.data(q_a_layernorm)
        self.q_b_proj: Any = nnx.data(q_b_proj)
        self.kv_a_proj_with_mqa = linear(hidden_size, rank + rope_dim, latent_bias)
        self.kv_a_layernorm = RMSNorm(rank, epsilon=epsilon, dtype=dtype)
        self.kv_b_proj = linear(rank, num_heads * (nope_dim + value_dim))
        self.o_proj = linear(num_heads * value_dim, hidden_size, output_bias)
        self.num_heads = num_heads
        self.rank = rank
        self.nope_dim = nope_dim
        self.rope_dim = rope_dim
        self.value_dim = value_dim
        self.scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
        self.interleaved = interleaved
        self.halves: Any = nnx.data(None)

    @property
    def stored(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and channels of what a cache has of a token: the latent, the rotated channels."""
        return (1, self.rank), (1, self.rope_dim)

    @takes_rows
    def __call__(
        self,
        x: Rows,
        angles: tuple[jax.Array, jax.Array],
        cache: LayerCache | None = None,
        *,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """As `Attention`; the cache is a latent `[B, 1, S, rank]` and a key `[B, 1, S, rope_dim]`.

        `angles` are those of `rope_dim` channels.
        """
        b, t, _ = x.shape
        q, q_rope, latent, rope = self._projected(x, angles)
        if self.kv_observer is not None:
            self.kv_observer(latent, rope)
        if cache is None:
            with jax.named_scope("attention"):
                k, v = self._expanded(latent[:, :, 0], rope)
                y = causal_attention(_joined(q, q_rope), k, v, scale=self.scale)
        elif start is None:
            raise ValueError("attention over a cache needs start, the first slot to write")
        else:
            # Write first, then attend: reading the old cache beside the new one copies it.
            with jax.named_scope("append"):
                pairs = zip(cache, (latent, rope), strict=True)
                cache = LayerCache(*(write_slots(side, new, start) for side, new in pairs))
            offset = jnp.broadcast_to(start, (b,)).astype(jnp.int32)
            seen = {"lengths": offset + t, "offset": offset, "scale": self.scale}
            y = self._attended(q, q_rope, cache, seen)
        with jax.named_scope("o_proj"):
            return self.o_proj(y.reshape(b, t, -1)), None if cache is None else cache.settled()

    def _projected(self, x: Rows, angles: Any) -> tuple[jax.Array, ...]:
        """`q [B, T, H, nope_dim]`, `q_rope`, and with one head latents and rotated channels."""
        b, t, _ = x.shape
        if self.q_proj is not None:
            with jax.named_scope("q_proj"):
                q = sums_of(self.q_proj, x).value()
        else:
            with jax.named_scope("q_a_proj"):
                latent = sums_of(self.q_a_proj, x).value()
            with jax.named_scope("q_b_proj"):
                q = sums_of(self.q_b_proj, normed(self.q_a_layernorm, latent)).value()
        with jax.named_scope("kv_a_proj_with_mqa"):
            latent, rope = sums_of(self.kv_a_proj_with_mqa, x).pieces((self.rank, self.rope_dim))
            latent = self.kv_a_layernorm(latent)[:, :, None]
        with jax.named_scope("rotary"):
            q = q.reshape(b, t, self.num_heads, -1)
            q, q_rope = q[..., : self.nope_dim], q[..., self.nope_dim :]
            q_rope, rope = (
                apply_rotary(a, angles, interleaved=self.interleaved)
                for a in (q_rope, rope[:, :, None])
            )
        return q, q_rope, latent, rope

    def _expanded(self, latent: jax.Array, rope: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values `[B, S, H, .]` of latents `[B, S, rank]` and rotated `[B, S, 1, .]`."""
        b, s, _ = latent.shape
        made = self.kv_b_proj(latent).reshape(b, s, self.num_heads, -1)
        k, v = made[..., : self.nope_dim], made[..., self.nope_dim :]
        return _joined(k, rope), v

    def _attended(
        self, q: jax.Array, q_rope: jax.Array, cache: LayerCache, seen: dict[str, Any]
    ) -> jax.Array:
        """Values `[B, T, H, value_dim]` over what the cache holds."""
        if not reads_rows(self.kv_b_proj):
            latent, rope = (side.dequantize(q.dtype).swapaxes(1, 2) for side in cache)
            k, v = (a.swapaxes(1, 2) for a in self._expanded(latent[:, :, 0], rope))
            return attention(_joined(q, q_rope), JoinedKeys((CacheTensor(k),)), v, **seen)
        with jax.named_scope("kv_b_proj"):
            of_keys, of_values = self._halves(q.dtype)
            q = _by_head("bthd,rhd->bthr", q, of_keys)
        y = attention(_joined(q, q_rope), JoinedKeys(tuple(cache)), cache.k, **seen)
        with jax.named_scope("kv_b_proj"):
            return _by_head("bthr,rhd->bthd", y, of_values)

    def settle(self, dtype: Any) -> None:
        """Decodes here, for a loop that follows in the same trace, what each step would decode."""
        if reads_rows(self.kv_b_proj) and isinstance(self.kv_b_proj.kernel, QuantizedWeight):
            with jax.named_scope("kv_b_proj"):
                self.halves = nnx.data(self._halves(dtype))

    def _halves(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """`kv_b_proj` for keys `[rank, H, nope_dim]` and for values `[rank, H, value_dim]`."""
        if self.halves is not None:
            return self.halves
        w = value(self.kv_b_proj.kernel)
        w = dequantize(w, dtype) if isinstance(w, QuantizedWeight) else w.astype(dtype)
        w = w.reshape(self.rank, self.num_heads, -1)
        return w[..., : self.nope_dim], w[..., self.nope_dim :]


def _joined(x: jax.Array, rope: jax.Array) -> jax.Array:
    """`x [B, T, H, .]` with the channels of `rope [B, T, H or 1, .]` after its own."""

    def join(x: jax.Array, rope: jax.Array) -> jax.Array:
        rope = jnp.broadcast_to(rope, (*x.shape[:3], rope.shape[3]))
        return jnp.concatenate([x, rope], axis=-1)

    return in_auto_axes(join, x, rope, result=lambda: [*spec_entries(x)[:3], None])


def _by_head(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """A product for each head, summed in float32, in the dtype of x."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        y = jnp.einsum(equation, x, w, precision=precision, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    return in_auto_axes(product, x, w, result=lambda: [*spec_entries(x)[:3], None])
