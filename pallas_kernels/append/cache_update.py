"""One token per sequence into a KV cache: rotation, quantization and the write, in one launch.

A program is one head of one sequence: a query is (normed,) rotated and returned, a key (normed,)
rotated, quantized and written to its slot, a value quantized and written. The cache is written in
place: inside a jitted function that donates it, XLA gives the kernel the cache's own buffer.

Codes, scales and zero points are those that quantizing the rotated key in XLA gives, bit for bit;
the rotation itself may differ by the last bit of the activations' dtype, for it is up to the
compiler where a product and a sum are rounded together.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.append.cache_row import (
    BOUNDS,
    SMALLEST_MAXIMUM,
    Row,
    quotient,
    rounding,
    write_row,
)
from pallas_kernels.attention.cache_words import describe_cache


class Appended(NamedTuple):
    """What `append` returns: the rotated queries ``[B, H, D]`` and the cache's arrays."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    k_zero: jax.Array | None
    v_zero: jax.Array | None


def append(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    k_zero: jax.Array | None = None,
    v_zero: jax.Array | None = None,
    *,
    heads: int,
    interleaved: bool,
    cache_format: str | None = None,
    bias: jax.Array | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    epsilon: float = 1e-6,
    dtype: Any = None,
) -> Appended:
    """Rotates the queries and writes the keys and values of one token per sequence to the cache.

    Args:
      qkv: ``[B, (H + 2 KH) D]``, queries, keys and values, or float32 partial sums
        ``[split, B, (H + 2 KH) D]`` of a matrix kernel.
      cos: float32 ``[B, D / 2]``, of the token's position.
      sin: as cos.
      slots: int32 ``[B]``, where to write; outside of the cache its nearest slot.
      k: ``[B, KH, S, D]`` floats or codes, int4 ``[B, KH, S, D / 2]``; given up.
      v: as k.
      k_scale: float32 ``[B, KH, S]``, given up and written, or the static ``[KH, D]`` or
        ``[KH, 1]``.
      v_scale: as k_scale.
      k_zero: uint8, of the shape of k_scale; int4 only.
      v_zero: as k_zero.
      heads: H.
      interleaved: whether channels 2i and 2i + 1 are rotated together, or i and i + D / 2.
      cache_format: ``int8``, ``float8_e4m3``, ``int4``; None for floats.
      bias: ``[(H + 2 KH) D]``, added to qkv.
      q_norm: ``[D]``, the scale of an RMS norm of each query before the rotation, or None.
      k_norm: likewise of keys; both or neither.
      epsilon: of the norms.
      dtype: of activations: everything is rounded to it as if it were stored; qkv's by default,
        and needed for partial sums.

    Raises:
      NotImplementedError: a head_dim without a kernel, or a gradient is taken.
      ValueError: arrays that do not belong together.
    """
    caches = (k, v, k_scale, v_scale, k_zero, v_zero)
    kept = (bias, q_norm, k_norm)
    shape = _describe(qkv, caches, heads, interleaved, cache_format, epsilon, dtype)
    _check(shape, k.shape[0], cos, sin, slots, kept)
    return Appended(*_differentiable(shape)(qkv, cos, sin, slots.astype(jnp.int32), caches, kept))


def append_reference(
    qkv, cos, sin, slots, k, v, k_scale=None, v_scale=None, k_zero=None, v_zero=None, **options
) -> Appended:
    """The meaning of `append` in jax.numpy; same arguments."""
    slots = jnp.clip(slots, 0, k.shape[2] - 1)
    shape = _describe(
        qkv,
        (k, v, k_scale, v_scale, k_zero, v_zero),
        options["heads"],
        options["interleaved"],
        options.get("cache_format"),
        options.get("epsilon", 1e-6),
        options.get("dtype"),
    )
    d, h, kh = shape.head_dim, shape.heads, shape.kv_heads
    y = qkv if shape.splits is None else jnp.sum(qkv, axis=0)
    y = y.astype(shape.dtype)
    if options.get("bias") is not None:
        y = y + options["bias"].astype(y.dtype)[None]
    y = y.reshape(y.shape[0], h + 2 * kh, d).astype(jnp.float32)
    q, key, value = y[:, :h], y[:, h : h + kh], y[:, h + kh :]
    rounded = rounding(shape.dtype)

    def rotate(x, norm):
        if norm is not None:
            mean = jnp.mean(x * x, axis=-1, keepdims=True)
            x = rounded(x * lax.rsqrt(mean + shape.epsilon) * norm.astype(jnp.float32)[None, None])
        if shape.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = jnp.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        a, b = a * c - b * s, b * c + a * s
        if shape.interleaved:
            return rounded(jnp.stack([a, b], axis=-1).reshape(x.shape))
        return rounded(jnp.concatenate([a, b], axis=-1))

    q = rotate(q, options.get("q_norm")).astype(shape.dtype)
    key = rotate(key, options.get("k_norm"))
    arrays: dict[str, Any] = {}
    for name, x, cache, scale, zero in (
        ("k", key, k, k_scale, k_zero),
        ("v", value, v, v_scale, v_zero),
    ):
        codes, new_scale, new_zero = _quantize_row(shape, x, scale, zero)
        arrays[name] = _write_reference(cache, codes.astype(cache.dtype), slots)
        arrays[f"{name}_scale"] = scale
        arrays[f"{name}_zero"] = zero
        if shape.dynamic:
            arrays[f"{name}_scale"] = _write_reference(scale, new_scale, slots)
            if zero is not None:
                arrays[f"{name}_zero"] = _write_reference(zero, new_zero.astype(zero.dtype), slots)
    return Appended(q=q, **arrays)


def _write_reference(cache, row, slots):
    def write(cache, row, slot):
        return lax.dynamic_update_slice_in_dim(cache, row[:, None], slot, axis=1)

    return jax.vmap(write)(cache, row, slots)


def _quantize_row(shape: Row, x, scale, zero) -> tuple[jax.Array, Any, Any]:
    """``x [B, KH, D]`` -> codes (int4: packed), scale and zero point ``[B, KH]``."""
    if shape.format is None:
        return x, None, None
    bound = jnp.float32(BOUNDS[shape.format])
    wide_zero: Any = None
    if not shape.dynamic:
        wide = scale.astype(jnp.float32)[None]
        wide_zero = None if zero is None else zero.astype(jnp.float32)[None]
    elif shape.format == "int4":
        high = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0.0)
        low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0.0)
        wide = quotient(jnp.maximum(high - low, jnp.float32(SMALLEST_MAXIMUM)), bound)
        wide_zero = jnp.clip(jnp.round(quotient(-low, wide)), 0.0, 15.0)
        scale, zero = wide[..., 0], wide_zero[..., 0]
    else:
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        wide = quotient(jnp.maximum(largest, jnp.float32(SMALLEST_MAXIMUM)), bound)
        scale = wide[..., 0]
    y = quotient(x, jnp.broadcast_to(wide, x.shape))
    if shape.format == "int4":
        codes = jnp.clip(jnp.round(y) + wide_zero, 0.0, 15.0).astype(jnp.uint8)
        return codes[..., 0::2] | codes[..., 1::2] << jnp.uint8(4), scale, zero
    y = jnp.clip(y, -bound, bound)
    if shape.format == "int8":
        return jnp.round(y).astype(jnp.int8), scale, None
    return lax.bitcast_convert_type(y.astype(jnp.float8_e4m3fn), jnp.uint8), scale, None


def _describe(qkv, caches, heads, interleaved, cache_format, epsilon, dtype) -> Row:
    k, v, k_scale, v_scale, k_zero, v_zero = caches
    kv_heads, slots, width = k.shape[1:]
    d = 2 * width if cache_format == "int4" else width
    side = describe_cache("append", (k, v), d, cache_format, (k_scale, v_scale), (k_zero, v_zero))
    splits = qkv.shape[0] if qkv.ndim == 3 else None
    if (
        qkv.ndim not in (2, 3)
        or qkv.shape[-1] != (heads + 2 * kv_heads) * d
        or qkv.shape[-2] != k.shape[0]
    ):
        raise ValueError(
            f"append: qkv {qkv.shape} beside a cache {k.shape} and heads={heads}: expected "
            f"[{k.shape[0]}, {(heads + 2 * kv_heads) * d}], or such partial sums."
        )
    if splits is not None and dtype is None:
        raise ValueError("append: partial sums of qkv need dtype, the activations' dtype.")
    return Row(
        heads,
        kv_heads,
        slots,
        d,
        interleaved,
        cache_format,
        side.dynamic,
        epsilon,
        jnp.dtype(qkv.dtype if dtype is None else dtype),
        splits,
    )


def _check(shape: Row, batch: int, cos, sin, slots, kept) -> None:
    bias, q_norm, k_norm = kept
    if (q_norm is None) != (k_norm is None):
        raise ValueError("append: q_norm and k_norm go together; found one of them.")
    d = shape.head_dim
    everything = (shape.heads + 2 * shape.kv_heads) * d
    for name, a, expected in (
        ("cos", cos, (batch, d // 2)),
        ("sin", sin, (batch, d // 2)),
        ("slots", slots, (batch,)),
        ("bias", bias, (everything,)),
        ("q_norm", q_norm, (d,)),
        ("k_norm", k_norm, (d,)),
    ):
        if a is not None and a.shape != expected:
            raise ValueError(f"append: expected {name} {list(expected)}, found {list(a.shape)}.")
    if not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ValueError(f"append: expected slots int32 [{batch}], found {slots.dtype.name}.")


def _differentiable(shape: Row):
    """The launch with a rule for vmap that widens the batch, and a clear word on gradients."""
    kernel = functools.partial(write_row, shape)

    @jax.custom_batching.custom_vmap
    def batchable(*arrays):
        return kernel(*arrays)

    @batchable.def_vmap
    def _fold(axis_size, batched, *arrays):
        leaves, tree = jax.tree.flatten(arrays)
        flags = jax.tree.leaves(batched)
        small = jax.tree.leaves(arrays[-1])
        if any(flags[len(leaves) - len(small) :]) or (not shape.dynamic and any(flags[6:])):
            raise NotImplementedError(
                "append: bias, norms and static scales belong to the model, found them batched by "
                "vmap; leave them out of in_axes, or use implementation='xla'."
            )
        wide = []
        for i, (a, is_batched) in enumerate(zip(leaves, flags, strict=True)):
            if i >= len(leaves) - len(small) or (not shape.dynamic and i >= 6):
                wide.append(a)
                continue
            a = a if is_batched else jnp.broadcast_to(a[None], (axis_size, *a.shape))
            at = 1 if i == 0 and shape.splits is not None else 0
            a = jnp.moveaxis(a, 0, at)
            wide.append(a.reshape(*a.shape[:at], -1, *a.shape[at + 2 :]))
        out = batchable(*jax.tree.unflatten(tree, wide))

        def unfold(a):
            return a.reshape(axis_size, -1, *a.shape[1:])

        static = () if shape.dynamic else tuple(range(3, 7))
        split = tuple(a if i in static or a is None else unfold(a) for i, a in enumerate(out))
        return split, tuple(None if a is None else i not in static for i, a in enumerate(out))

    @jax.custom_vjp
    def differentiable(*arrays):
        return batchable(*arrays)

    def forward(*arrays):
        return batchable(*arrays), None

    def backward(_, cotangent):
        raise NotImplementedError(
            "append: a cache that is written in place has no gradient; use implementation='xla'."
        )

    differentiable.defvjp(forward, backward)
    return differentiable
