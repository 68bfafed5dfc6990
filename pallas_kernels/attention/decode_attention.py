"""Attention of one new token per sequence over a quantized KV cache.

    out[b, h] = sum_s softmax_s(scale * q[b, h] . key[b, h // G, s]) * value[b, h // G, s]

A program takes one (sequence, KV head), the query heads of its group and a part of the sequence;
the parts become one in a second launch, and with one part there is none. Two kernels do it:
`attention_cuda_cores` on every GPU, `attention_mma` on tensor cores where a group has two query
heads or more.

Scales never touch the cache: per token they multiply scores and probabilities, per channel or head
the query and the output.

Instructions that a thread spends on a byte of the cache (SASS of the hot loop, loads included,
head_dim 128), with registers in brackets, as compiled for L4; on the other GPUs they differ by a
tenth at most, and nothing spills. At full bandwidth a GPU can issue about 31 on T4, 57 on L4, 11 on
A100, 10 on H100 and 7 on H200.

====================  =====================================  ==================================
cache                 CUDA cores, group of 1 / 2 / 4         tensor cores, group up to 8 / 16
====================  =====================================  ==================================
int8 token_head       5.5 (95) / 7.4 (147) / 11.9 (242)      3.1 (160) / 4.7 (205)
float8 token_head     6.0 (96) / 7.8 (151) / 12.3 (236)      3.9 (151) / 5.5 (199)
int8 channel          5.2 (96) / 7.1 (147) / 11.4 (236)      2.6 (165) / 4.2 (226)
int4 token_head       11.9 (111) / 15.5 (143) / 24.3 (241)   5.8 (191) / 8.0 (240)
int4 channel          10.8 (92) / 14.4 (140) / 23.2 (236)    4.3 (206) / 6.6 (254)
bfloat16              1.7 (92) / 2.8 (125) / 4.8 (218)       1.0 (131) / 1.7 (194)
====================  =====================================  ==================================
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import cuda_cores as attention_cuda_cores
from pallas_kernels.attention import mma as attention_mma
from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.cache.formats import CACHE_WORDS, describe_cache
from pallas_kernels.cache.words import CacheWords
from pallas_kernels.device import default_device
from pallas_kernels.transformations import batchable, differentiable
from pallas_kernels.typing import Array, Float, Int


def decode_attention_reference(
    q: Float[Array, "b h d"],
    k: CacheArrays,
    v: CacheArrays,
    *,
    lengths: Int[Array, " b"],
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Float[Array, "b h d"]:
    """The meaning of `decode_attention`: decode the cache, one softmax over all slots, float32."""
    b, h, d = q.shape
    keys, values = _values(k), _values(v)
    kh, slots = keys.shape[1:3]
    queries = q.astype(jnp.float32).reshape(b, kh, h // kh, d)
    slot = jnp.arange(slots)[None, None, None, :]
    end = lengths[:, None, None, None]
    visible = slot < end
    if sliding_window is not None:
        visible &= slot >= end - sliding_window
    highest = lax.Precision.HIGHEST
    scores = jnp.einsum("bkgd,bksd->bkgs", queries, keys, precision=highest)
    scores = jnp.where(visible, scores * (d**-0.5 if scale is None else scale), -jnp.inf)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)
    out = jnp.einsum("bkgs,bksd->bkgd", weights, values, precision=highest)
    return out.reshape(b, h, d).astype(q.dtype)


def _values(side: CacheArrays) -> jax.Array:
    """float32 `[B, KH, S, D]`: `(code - zero) * scale`, from the definition of each format."""
    words = CACHE_WORDS[side.format]
    values = words(side.codes.dtype, False, side.codes.shape[-1] * words.packed).values(side.codes)

    def wide(a):
        a = a.astype(jnp.float32)
        return a[..., None] if a.ndim == 3 else a[None, :, None, :]

    if side.zero is not None:
        values = values - wide(side.zero)
    return values if side.scale is None else values * wide(side.scale)


def decode_attention(
    q: Float[Array, "b h d"],
    k: CacheArrays,
    v: CacheArrays,
    *,
    lengths: Int[Array, " b"],
    sliding_window: int | None = None,
    scale: float | None = None,
    parts: int | None = None,
    tensor_cores: bool | None = None,
) -> Float[Array, "b h d"]:
    """The newest token of each sequence attends to the slots `s < lengths[b]`; none gives zeros.

    q is float `[B, H, D]` after the rotation, D 64, 128 or 256; head h reads KV head
    `h // (H / KH)`. The result has its dtype; scores, softmax and sums are float32.
    `sliding_window` counts the token's own slot; `scale` is `D ** -0.5` if None; `parts` are the
    programs that share a sequence, None chooses by the device's multiprocessors. `tensor_cores`:
    None uses them from sm_80 on where a KV head has 2 query heads or more, and not in the
    interpreter, which emulates them if True; scales of values must be positive there (per token,
    0 counts as 2^-64).

    Raises:
      NotImplementedError: a head_dim without a kernel, or tensor cores for what they have none.
      ValueError: arrays that do not belong together.
    """
    if q.ndim != 3:
        raise ValueError(f"decode_attention: expected q [B, H, D], found {q.shape}.")
    d = q.shape[-1]
    side = describe_cache("decode_attention", k, v, d)
    shape = k.codes.shape
    _check(q, shape, lengths, sliding_window, parts)
    kernel = functools.partial(
        _implementation(side, q.shape[1] // shape[1], shape[2], tensor_cores),
        side=side,
        sliding_window=sliding_window,
        scale=d**-0.5 if scale is None else scale,
        parts=parts,
    )

    def reference(q, k, v, lengths):
        settings = {"sliding_window": sliding_window, "scale": scale}
        return decode_attention_reference(q, k, v, lengths=lengths, **settings)

    def gradient(cotangent, *arrays):
        return jax.vjp(reference, *arrays)[1](cotangent)

    run = differentiable(batchable(kernel, _wider_batch(kernel)), gradient)
    return run(q, k, v, lengths.astype(jnp.int32))


def _wider_batch(kernel):
    """For `batchable`: caches of their own are more sequences; static scales are of the model."""

    def fold(axis_size, batched, *arrays):
        leaves, tree = jax.tree.flatten(arrays)
        flags = jax.tree.leaves(batched)
        pairs = list(zip(leaves, flags, strict=True))
        mixed = any(flag == (a.ndim - flag == 2) for a, flag in pairs[1:-1])
        if mixed or not (flags[0] and flags[-1]):
            return None
        wide = [a.reshape(-1, *a.shape[2:]) if flag else a for a, flag in pairs]
        out = kernel(*jax.tree.unflatten(tree, wide))
        return out.reshape(axis_size, -1, *out.shape[1:])

    return fold


def _implementation(side: CacheWords, group: int, slots: int, tensor_cores: bool | None):
    """The `attend` of `attention_mma` or of `attention_cuda_cores`."""
    supported = attention_mma.supports(side, group, slots)
    if tensor_cores is None:
        capability = getattr(default_device(), "compute_capability", None)
        modern = capability is not None and float(capability) >= 8.0
        tensor_cores = modern and supported and group >= 2
    if tensor_cores and not supported:
        raise NotImplementedError(
            f"decode_attention: no tensor-core kernel for a {side.dtype.name} cache of {slots} "
            f"slots, head_dim {side.head_dim} and {group} query heads a KV head; leave "
            "tensor_cores as None."
        )
    return attention_mma.attend if tensor_cores else attention_cuda_cores.attend


def _check(q, shape, lengths, sliding_window, parts) -> None:
    b, h, _ = q.shape
    if b != shape[0] or not h or h % shape[1]:
        raise ValueError(
            f"decode_attention: q {q.shape} does not belong to a cache [B, KH, S, ...] {shape}: "
            "expected the same B, and H a multiple of KH."
        )
    if lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"decode_attention: expected lengths int32 [{b}], one for each sequence; found "
            f"{lengths.dtype.name} {lengths.shape}."
        )
    for name, value in (("sliding_window", sliding_window), ("parts", parts)):
        if value is not None and value < 1:
            raise ValueError(f"decode_attention: {name}={value}, expected 1 or more, or None.")
