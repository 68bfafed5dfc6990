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
from pallas_kernels.attention.cache_words import CacheWords, describe_cache
from pallas_kernels.device import default_device


def decode_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    k_zero: jax.Array | None = None,
    v_zero: jax.Array | None = None,
    cache_format: str | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The meaning of `decode_attention`: decode the cache, one softmax over all slots, float32."""
    b, h, d = q.shape
    kh = k.shape[1]
    keys = _values(k, k_scale, k_zero, cache_format)
    values = _values(v, v_scale, v_zero, cache_format)
    queries = q.astype(jnp.float32).reshape(b, kh, h // kh, d)
    slot = jnp.arange(k.shape[2])[None, None, None, :]
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


def _values(codes, scale, zero, cache_format) -> jax.Array:
    """float32 ``[B, KH, S, D]``: ``(code - zero) * scale``, from the definition of each format."""
    if cache_format is None:
        return codes.astype(jnp.float32)
    if cache_format == "int4":
        nibbles = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=-1)
        values = nibbles.reshape(*codes.shape[:-1], -1).astype(jnp.float32)
    elif cache_format == "float8_e4m3":
        values = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    else:
        values = codes.astype(jnp.float32)

    def wide(a):
        return a[..., None] if a.ndim == 3 else a[None, :, None, :]

    if zero is not None:
        values = values - wide(zero).astype(jnp.float32)
    return values * wide(scale).astype(jnp.float32)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    k_zero: jax.Array | None = None,
    v_zero: jax.Array | None = None,
    cache_format: str | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
    parts: int | None = None,
    tensor_cores: bool | None = None,
) -> jax.Array:
    """The newest token of each sequence attends to the slots ``s < lengths[b]``.

    Args:
      q: float ``[B, H, D]`` after the rotation; head h reads KV head ``h // (H / KH)``.
      k: ``[B, KH, S, D]`` bf16, f16, f32, int8, or uint8 bits of float8_e4m3; int4: uint8
        ``[B, KH, S, D / 2]``, the even channel in the low nibble. D is 64, 128 or 256.
      v: as k.
      lengths: int32 ``[B]``, valid slots; a sequence of length 0 gets zeros.
      k_scale: float32, ``[B, KH, S]`` per token, ``[KH, D]`` or ``[KH, 1]`` static; None for
        floats.
      v_scale: as k_scale; on tensor cores positive (per token, 0 counts as 2^-64).
      k_zero: uint8 zero points of the shape of k_scale; int4 only.
      v_zero: as k_zero.
      cache_format: ``int8``, ``float8_e4m3``, ``int4``; None for floats.
      sliding_window: slots that the token sees, its own included; None for all.
      scale: multiplies the scores; ``D ** -0.5`` if None.
      parts: programs that share a sequence; None chooses by the device's multiprocessors.
      tensor_cores: whether to multiply on tensor cores; None does so from sm_80 on where a KV head
        has 2 query heads or more, and not in the interpreter, which emulates them if True.

    Returns:
      ``[B, H, D]`` in the dtype of q; scores, softmax and sums are float32.

    Raises:
      NotImplementedError: a head_dim without a kernel, or tensor cores for what they have none.
      ValueError: arrays that do not belong together.
    """
    if q.ndim != 3:
        raise ValueError(f"decode_attention: expected q [B, H, D], found {q.shape}.")
    d = q.shape[-1]
    side = describe_cache(
        "decode_attention", (k, v), d, cache_format, (k_scale, v_scale), (k_zero, v_zero)
    )
    _check(q, k, lengths, sliding_window, parts)
    static = functools.partial(
        _implementation(side, q.shape[1] // k.shape[1], k.shape[2], tensor_cores),
        side=side,
        sliding_window=sliding_window,
        scale=d**-0.5 if scale is None else scale,
        parts=parts,
    )
    reference = functools.partial(
        _reference_positional,
        cache_format=cache_format,
        sliding_window=sliding_window,
        scale=scale,
    )
    arrays = (q, k, v, lengths.astype(jnp.int32), k_scale, v_scale, k_zero, v_zero)
    return _differentiable(static, reference)(*arrays)


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


def _reference_positional(q, k, v, lengths, k_scale, v_scale, k_zero, v_zero, **static):
    return decode_attention_reference(
        q,
        k,
        v,
        lengths=lengths,
        k_scale=k_scale,
        v_scale=v_scale,
        k_zero=k_zero,
        v_zero=v_zero,
        **static,
    )


def _differentiable(kernel, reference):
    """The kernel with the reference's gradient, and with a rule for vmap that widens the batch."""

    @jax.custom_batching.custom_vmap
    def batchable(*arrays):
        return kernel(*arrays)

    @batchable.def_vmap
    def _fold(axis_size, batched, *arrays):
        # Positions: q, k, v, lengths, then scales and zeros, which are of the cache where static.
        folds = all(batched[:4]) and all(
            array is None or is_batched == (array.ndim - is_batched == 3)
            for array, is_batched in zip(arrays[4:], batched[4:], strict=True)
        )
        if not folds:
            axes = [0 if is_batched else None for is_batched in batched]
            return jax.vmap(reference, in_axes=axes)(*arrays), True
        wide = [
            a.reshape(-1, *a.shape[2:]) if is_batched else a
            for a, is_batched in zip(arrays, batched, strict=True)
        ]
        out = batchable(*wide)
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    @jax.custom_vjp
    def differentiable(*arrays):
        return batchable(*arrays)

    def forward(*arrays):
        return batchable(*arrays), arrays

    def backward(arrays, cotangent):
        return jax.vjp(reference, *arrays)[1](cotangent)

    differentiable.defvjp(forward, backward)
    return differentiable


def _check(q, k, lengths, sliding_window, parts) -> None:
    b, h, _ = q.shape
    if b != k.shape[0] or not h or h % k.shape[1]:
        raise ValueError(
            f"decode_attention: q {q.shape} does not belong to a cache [B, KH, S, ...] {k.shape}: "
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
