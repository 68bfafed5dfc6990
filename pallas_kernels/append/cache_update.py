"""One token per sequence into a KV cache: rotation, quantization and the write, in one launch.

A program is one head of one sequence: a query is (normed,) rotated and returned, a key (normed,)
rotated, quantized and written to its slot, a value quantized and written. The cache is written in
place: inside a jitted function that donates it, XLA gives the kernel the cache's own buffer.

Codes, scales and zero points are those that quantizing the rotated key in XLA gives, bit for bit;
the rotation itself may differ by the last bit of the activations' dtype, for it is up to the
compiler where a product and a sum are rounded together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.append.cache_row import Row, write_row
from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.cache.formats import CACHE_WORDS, describe_cache
from pallas_kernels.cache.rounding import rounding
from pallas_kernels.transformations import batchable, differentiable
from pallas_kernels.typing import Array, Float, Int


class Appended(NamedTuple):
    """What `append` returns: the rotated queries `[B, H, D]`, and the cache."""

    q: jax.Array
    k: CacheArrays
    v: CacheArrays


def append(
    qkv: Float[Array, "b n"] | Float[Array, "split b n"],
    cos: Float[Array, "b pairs"],
    sin: Float[Array, "b pairs"],
    slots: Int[Array, " b"],
    k: CacheArrays,
    v: CacheArrays,
    *,
    heads: int,
    interleaved: bool,
    bias: Float[Array, " n"] | None = None,
    q_norm: Float[Array, " d"] | None = None,
    k_norm: Float[Array, " d"] | None = None,
    epsilon: float = 1e-6,
    dtype: Any = None,
) -> Appended:
    """Rotates the queries and writes the keys and values of one token per sequence to the cache.

    qkv is `[B, (H + 2 KH) D]`, queries, keys and values, or float32 partial sums of them
    `[split, B, (H + 2 KH) D]`; `bias` is added to it. `cos` and `sin` are float32 `[B, D / 2]`, of
    the token's position; `interleaved` rotates channels 2i and 2i + 1 together, else i and
    i + D / 2. `slots` outside of the cache mean its nearest slot. Codes, and what else belongs to
    tokens, of k and v are given up and written. `q_norm` and `k_norm` `[D]`, both or neither, are
    scales of an RMS norm before the rotation. Everything is rounded to `dtype`, of activations, as
    if it were stored; it is qkv's by default, and needed for partial sums.

    Raises:
      NotImplementedError: a head_dim without a kernel, or a gradient is taken.
      ValueError: arrays that do not belong together.
    """
    kept = (bias, q_norm, k_norm)
    shape = _describe(qkv, k, v, heads, interleaved, epsilon, dtype)
    _check(shape, k.codes.shape[0], cos, sin, slots, kept)
    kernel = functools.partial(write_row, shape)
    run = differentiable(batchable(kernel, _wider_batch(shape)), _no_gradient)
    q, written = run(qkv, cos, sin, slots.astype(jnp.int32), k, v, kept)
    return Appended(q, *(_updated(side, name, written) for name, side in (("k", k), ("v", v))))


def append_reference(qkv, cos, sin, slots, k: CacheArrays, v: CacheArrays, **options) -> Appended:
    """The meaning of `append` in jax.numpy; same arguments."""
    slots = jnp.clip(slots, 0, k.codes.shape[2] - 1)
    more = {"epsilon": options.get("epsilon", 1e-6), "dtype": options.get("dtype")}
    shape = _describe(qkv, k, v, options["heads"], options["interleaved"], **more)
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
    sides = ((k, rotate(key, options.get("k_norm"))), (v, value))
    return Appended(q, *(_write_reference(shape, side, x, slots) for side, x in sides))


def _write_reference(shape: Row, cache: CacheArrays, x: jax.Array, slots: jax.Array) -> CacheArrays:
    """The cache with tokens `x [B, KH, D]` in it."""
    words = shape.side
    scale: Any
    zero: Any
    if words.dynamic:
        scale, zero = words.parameters(x)
    else:
        given = (cache.scale, cache.zero)
        scale, zero = (None if a is None else a.astype(jnp.float32)[None] for a in given)

    def write(old, row):
        def one(old, row, slot):
            return lax.dynamic_update_slice_in_dim(old, row[:, None], slot, axis=1)

        return jax.vmap(one)(old, row.astype(old.dtype), slots)

    changes: dict[str, Any] = {"codes": write(cache.codes, words.codes(x, scale, zero))}
    if words.dynamic:
        changes["scale"] = write(cache.scale, scale[..., 0])
        if zero is not None:
            changes["zero"] = write(cache.zero, zero[..., 0])
    return dataclasses.replace(cache, **changes)


def _updated(side: CacheArrays, name: str, written: dict[str, jax.Array]) -> CacheArrays:
    names = {"codes": name, "scale": f"{name}_scale", "zero": f"{name}_zero"}
    changes = {field: written[key] for field, key in names.items() if key in written}
    return dataclasses.replace(side, **changes)


def _describe(qkv, k: CacheArrays, v: CacheArrays, heads, interleaved, epsilon, dtype) -> Row:
    kv_heads, slots, width = k.codes.shape[1:]
    d = width * CACHE_WORDS[k.format].packed
    side = describe_cache("append", k, v, d)
    splits = qkv.shape[0] if qkv.ndim == 3 else None
    expected = (k.codes.shape[0], (heads + 2 * kv_heads) * d)
    if qkv.ndim not in (2, 3) or qkv.shape[-2:] != expected:
        raise ValueError(
            f"append: qkv {qkv.shape} beside a cache {k.codes.shape} and heads={heads}: expected "
            f"{list(expected)}, or such partial sums."
        )
    if splits is not None and dtype is None:
        raise ValueError("append: partial sums of qkv need dtype, the activations' dtype.")
    dtype = jnp.dtype(qkv.dtype if dtype is None else dtype)
    return Row(heads, kv_heads, slots, side, interleaved, epsilon, dtype, splits)


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


def _wider_batch(shape: Row):
    """For `batchable`: caches of their own are more sequences of one launch."""

    def fold(axis_size, batched, qkv, cos, sin, slots, k, v, kept):
        small = jax.tree.leaves([(side.scale, side.zero) for side in batched[4:6]])
        if any(jax.tree.leaves(batched[6])) or (shape.side.static and any(small)):
            raise NotImplementedError(
                "append: bias, norms and static scales belong to the model, found them batched by "
                "vmap; leave them out of in_axes, or use implementation='xla'."
            )

        def widened(a, is_batched, at=0):
            a = a if is_batched else jnp.broadcast_to(a[None], (axis_size, *a.shape))
            a = jnp.moveaxis(a, 0, at)
            return a.reshape(*a.shape[:at], -1, *a.shape[at + 2 :])

        at = 0 if shape.splits is None else 1
        qkv = widened(qkv, batched[0], at)
        cos, sin, slots = map(widened, (cos, sin, slots), batched[1:4])

        def side(cache, flags):
            if shape.side.dynamic:
                return jax.tree.map(widened, cache, flags)
            return dataclasses.replace(cache, codes=widened(cache.codes, flags.codes))

        out = write_row(shape, qkv, cos, sin, slots, side(k, batched[4]), side(v, batched[5]), kept)
        return jax.tree.map(lambda a: a.reshape(axis_size, -1, *a.shape[1:]), out)

    return fold


def _no_gradient(*_):
    raise NotImplementedError(
        "append: a cache that is written in place has no gradient; use implementation='xla'."
    )
