"""Attention of prompts by cuDNN: keys and values decoded once, one fused call of the library's."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.block_tensor import BlockTensor
from fdq.cache.cache_tensor import CacheTensor
from fdq.ops import self_check
from fdq.ops.attention.joined import JoinedKeys
from fdq.ops.attention.xla import AttentionArguments, Xla, attention_reference
from fdq.ops.choice import compute_capability
from fdq.ops.implementation import Implementation
from fdq.ops.placement import sharded
from pallas_kernels.device import default_device

MOST_MASKED = 2**28
"""Of the mask, which the library reads as 16-bit numbers that are added: queries by slots."""

_TOLERANCE = 0.03  # of 16-bit results and probabilities


class Cudnn(Implementation[AttentionArguments]):
    """`jax.nn.dot_product_attention`, where cuDNN takes dtype, shape and mask."""

    name = "cudnn"

    def skipped(self) -> str | None:
        """Where there is no cuDNN."""
        platform = default_device().platform
        return None if platform in ("gpu", "cuda") else "the device is not a GPU"

    def unsupported(self, arguments: AttentionArguments) -> str | None:
        """What cuDNN does not know: sinks, caps, float32, wide heads; and where there is none."""
        a = arguments
        if self.skipped() or not self_check.is_real(default_device()):
            return "there is no cuDNN for this device here"
        return unsupported(a, compute_capability())

    def declined(self, arguments: AttentionArguments) -> str | None:
        """One query, and what the self-check says."""
        a = arguments
        if a.q.shape[1] == 1:
            return "one query is no prompt"
        d, dtype = a.q.shape[3], a.q.dtype
        group = a.q.shape[2] // a.k.shape[1]
        return self_check_of(group, d, dtype).failure(default_device())

    def __call__(self, arguments: AttentionArguments) -> jax.Array:
        """`[B, T, H, D]`."""
        return attend(arguments, "cudnn")


def unsupported(a: AttentionArguments, capability: float) -> str | None:
    """Why cuDNN on a GPU of that compute capability does not compute this; None if it does."""
    if a.sinks is not None or a.softcap is not None:
        return "cuDNN has neither sinks nor caps"
    if a.q.dtype not in (jnp.bfloat16, jnp.float16) or capability < 8:
        return f"cuDNN takes 16-bit floats from sm_80 on, found {a.q.dtype} and {capability}"
    if isinstance(a.k, JoinedKeys) or a.k.head_dim != a.v.head_dim or a.is_ring:
        return "cuDNN takes keys in one tensor, as wide as values, and no ring"
    if isinstance(a.k, BlockTensor) or isinstance(a.v, BlockTensor):
        return "cuDNN reads no caches with open blocks"
    if not all(isinstance(n, int) for n in (*a.q.shape, *a.k.shape)):
        return "cuDNN takes known sizes"
    d, most = a.q.shape[3], 256 if capability >= 9 else 128
    if d % 8 or d > most:
        return f"cuDNN takes heads of 8, 16, ... {most}, found {d}"
    if a.q.shape[0] * a.q.shape[1] * _span(a) > MOST_MASKED:
        return "the mask would be larger than 512 MB"
    return sharded(a.q, a.k, a.v)


def _span(a: AttentionArguments) -> int:
    """Slots that queries of one sequence see at most, all of the cache without a window."""
    slots = a.k.shape[2]
    if a.sliding_window is None:
        return slots
    # 64 is what the library pads to anyhow.
    return min(slots, -(-(a.q.shape[1] + a.sliding_window - 1) // 64) * 64)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend(implementation, sliding_window, scale, q, k, v, lengths, offset):
    """Traced once for all layers."""
    a = AttentionArguments(q, k, v, lengths, offset, sliding_window, scale)
    t, slots, span = q.shape[1], k.shape[2], _span(a)
    keys, values = (jnp.swapaxes(side.dequantize(), 1, 2).astype(q.dtype) for side in (k, v))
    first = jnp.zeros_like(offset)
    if span < slots:
        assert sliding_window is not None
        first = jnp.clip(offset - (sliding_window - 1), 0, slots - span)
        cut = jax.vmap(lambda side, at: lax.dynamic_slice_in_dim(side, at, span, axis=0))
        keys, values = cut(keys, first), cut(values, first)
    position = (offset[:, None] + jnp.arange(t, dtype=jnp.int32)[None])[:, None, :, None]
    slot = (first[:, None] + jnp.arange(span, dtype=jnp.int32)[None])[:, None, None, :]
    mask = (slot <= position) & (slot < lengths[:, None, None, None])
    if sliding_window is not None:
        mask &= slot > position - sliding_window
    # Slots after the last are not only masked: the library does not read them.
    known = jnp.clip(lengths - first, 1, span)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function mixes dtypes
        out = jax.nn.dot_product_attention(
            q,
            keys,
            values,
            mask=mask,
            scale=scale,
            key_value_seq_lengths=known,
            implementation=implementation,
        )
    seen = jnp.any(mask, axis=-1)[:, 0, :, None, None]
    return jnp.where(seen, out, jnp.zeros_like(out))


@_attend.defjvp
def _(implementation, sliding_window, scale, primals, tangents):
    """XLA's: cuDNN's call has no forward derivative, and no reverse one for every mask."""

    def plain(q, k, v, lengths, offset):
        return Xla()(AttentionArguments(q, k, v, lengths, offset, sliding_window, scale))

    _, tangent = jax.jvp(plain, primals, tangents)
    return _attend(implementation, sliding_window, scale, *primals), tangent


def attend(a: AttentionArguments, implementation: Any) -> jax.Array:
    """Attention by JAX's own: `implementation` is cuDNN, or XLA's, which tests compare."""
    return _attend(implementation, a.sliding_window, a.scale, a.q, a.k, a.v, a.lengths, a.offset)


def self_check_of(group: int, d: int, dtype: Any) -> self_check.Check:
    """The self-check of cuDNN's attention, `group` query heads of `d` channels a KV head."""
    detail = f"{group} heads of {d}, {jnp.dtype(dtype).name}"
    case = functools.partial(prompt_case, group, d, dtype, "cudnn")
    return self_check.Check("prompt_attention", detail, case, _TOLERANCE)


def prompt_case(group: int, d: int, dtype: Any, implementation: str) -> tuple[Any, Any]:
    """For the self-check: a prompt's second chunk, of two lengths, with and without a window."""
    keys = jax.random.split(jax.random.key(3), 3)
    q = jax.random.normal(keys[0], (2, 64, 2 * group, d)).astype(dtype)
    k, v = (CacheTensor(jax.random.normal(key, (2, 2, 320, d)).astype(dtype)) for key in keys[1:])
    lengths = jnp.asarray([192, 90], jnp.int32)
    results, wanted = [], []
    for window in (None, 100):
        arguments = AttentionArguments(q, k, v, lengths, lengths - 64, window, d**-0.5)
        results.append(attend(arguments, implementation))
        settings: Any = {"lengths": lengths, "sliding_window": window}
        wanted.append(attention_reference(q, k, v, **settings))
    return results, wanted
