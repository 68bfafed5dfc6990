"""Keys and values ``[B, KH, T, D]`` <-> the codes of a quantized KV cache.

=====================  ==============================  ==========================================
``CacheSpec``          scale (float32)                 value
=====================  ==============================  ==========================================
None (C16)             none                            the array itself
int8, token_head       ``[B, KH, T]``, absmax / 127    ``code * scale``
float8, token_head     ``[B, KH, T]``, absmax / 448    ``code * scale``
int4, token_head       ``[B, KH, T]`` and uint8 zero   ``(code - zero) * scale``, codes 0 .. 15
int8, channel          ``[KH, D]``, static             ``code * scale``
float8 or int8, head   ``[KH, 1]``, static             ``code * scale``
int4, static           ``[KH, D]`` or ``[KH, 1]``      ``(code - zero) * scale``
=====================  ==============================  ==========================================

Scales are float32: 32 / D bits an element, 0.25 at D = 128 (FastDeploy's dynamic cache stores
bfloat16, 0.125). float8 codes are held as their bits, uint8: to slice or update a float8 array
XLA's CPU backend widens it to float16 first. int4 codes are packed along D, the even channel in the
low nibble, and their dynamic scales and zeros take 40 / D bits an element.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.exact_arithmetic import quotient
from fdq.ops.weight_view import e4m3_values
from fdq.schemes.scheme import CacheSpec

CACHE_SCALE_DTYPE = jnp.float32
_SMALLEST_MAXIMUM = 1e-10


def quantize_cache(
    x: jax.Array,
    spec: CacheSpec | None,
    *,
    scale: jax.Array | None = None,
    zero: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Codes, scales and zero points of keys (after the rotation) or values.

    Args:
      x: float ``[B, KH, T, D]``.
      spec: None returns x.
      scale: the calibrated one of a static spec, ``[KH, D]`` or ``[KH, 1]``; not allowed for a
        dynamic one.
      zero: likewise; int4 only.

    Returns:
      ``(codes, scale, zero)``; codes are int8 ``[B, KH, T, D]``, uint8 ``[B, KH, T, D]`` that hold
      the bits of float8_e4m3fn, or uint8 ``[B, KH, T, D / 2]`` for int4. Static scales come back as
      they were given.
    """
    if spec is None:
        return x, None, None
    if spec.dynamic == (scale is not None):
        kind = "dynamic" if spec.dynamic else "static"
        found = "one" if spec.dynamic else "None"
        expected = "no scale" if spec.dynamic else "a calibrated scale"
        raise ValueError(f"{kind} {spec.format} KV cache: expected {expected}, found {found}.")
    x = x.astype(jnp.float32)
    if spec.dynamic:
        scale, zero, wide_scale, wide_zero = _dynamic_parameters(x, spec)
    else:
        assert scale is not None
        wide_scale = scale.astype(jnp.float32)[None, :, None, :]
        wide_zero = None if zero is None else zero.astype(jnp.float32)[None, :, None, :]
    y = quotient(x, wide_scale)
    if spec.format == "int4":
        if wide_zero is None:
            raise ValueError("int4 KV cache: expected zero points, found None (zero_point=True).")
        return _pack(jnp.clip(jnp.round(y) + wide_zero, 0.0, 15.0).astype(jnp.uint8)), scale, zero
    bound = spec.bound
    if spec.format == "int8":
        return jnp.clip(jnp.round(y), -bound, bound).astype(jnp.int8), scale, zero
    codes = jnp.clip(y, -bound, bound).astype(jnp.float8_e4m3fn)
    return lax.bitcast_convert_type(codes, jnp.uint8), scale, zero


def _dynamic_parameters(x: jax.Array, spec: CacheSpec) -> tuple[Any, Any, Any, Any]:
    """Scale and zero ``[B, KH, T]`` of each token and head, and both as ``[B, KH, T, 1]``."""
    if spec.format == "int4":
        high = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), 0.0)
        low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), 0.0)
        wide = quotient(jnp.maximum(high - low, jnp.float32(_SMALLEST_MAXIMUM)), spec.bound)
        zero = jnp.clip(jnp.round(quotient(-low, wide)), 0.0, 15.0)
        return wide[..., 0], zero[..., 0].astype(jnp.uint8), wide, zero
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    wide = quotient(jnp.maximum(largest, jnp.float32(_SMALLEST_MAXIMUM)), spec.bound)
    return wide[..., 0], None, wide, None


def dequantize_cache(
    codes: jax.Array,
    spec: CacheSpec | None,
    scale: jax.Array | None = None,
    zero: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Codes ``[B, KH, S, D]`` (int4: ``D / 2`` bytes) -> values ``[B, KH, S, D]`` in ``dtype``."""
    if spec is None:
        return codes.astype(dtype)
    assert scale is not None
    values = join_planes(cache_code_planes(codes, spec))
    if scale.ndim == 3:
        scale = scale[..., None]
        zero = None if zero is None else zero[..., None]
    else:
        scale = scale[None, :, None, :]
        zero = None if zero is None else zero[None, :, None, :]
    if zero is not None:
        values = values - zero.astype(jnp.float32)
    return (values * scale.astype(jnp.float32)).astype(dtype)


def cache_code_planes(codes: jax.Array, spec: CacheSpec | None) -> list[jax.Array]:
    """The values of codes before zero point and scale, float32; exact.

    Returns:
      One array ``[..., D]``, or the even and the odd channels of int4, ``[..., D / 2]`` each.
    """
    if spec is not None and spec.format == "int4":
        return [
            (codes & jnp.uint8(15)).astype(jnp.float32),
            (codes >> jnp.uint8(4)).astype(jnp.float32),
        ]
    if spec is not None and spec.format == "float8_e4m3":
        if codes.dtype != jnp.uint8:
            codes = lax.bitcast_convert_type(codes, jnp.uint8)
        # XLA's own conversion is a slow sequence of selects.
        return [e4m3_values(codes) * jnp.float32(256)]
    return [codes.astype(jnp.float32)]


def join_planes(planes: list[jax.Array]) -> jax.Array:
    """Undoes taking every P-th channel: P arrays ``[..., D / P]`` -> ``[..., D]``."""
    if len(planes) == 1:
        return planes[0]
    return jnp.stack(planes, axis=-1).reshape(*planes[0].shape[:-1], -1)


def _pack(codes: jax.Array) -> jax.Array:
    """uint8 ``[..., D]`` below 16 -> ``[..., D / 2]``, the even channel in the low nibble."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << jnp.uint8(4)
