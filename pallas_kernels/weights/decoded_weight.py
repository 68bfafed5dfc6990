"""The float32 weight that kernel arrays stand for, in plain JAX: references and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.typing import Array, Float
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.word_format import words_to_bytes


def decoded_weight(w: KernelWeight) -> Float[Array, "*lead k n"]:
    """float32 `[..., K, N]`, by the same masks as the kernels, with conversions."""
    layout, words = w.layout, w.layout.words
    *lead, rows, columns = w.words.shape
    units = w.words.reshape(*lead, rows // words.words, words.words, columns)
    constants = [jnp.broadcast_to(c, units[..., 0, :].shape) for c in w.constants]
    decoded = words.decode([units[..., i, :] for i in range(words.words)], constants, True)
    last = words.exponent(True)
    powers = [jnp.float32(2.0 ** (e + last)) for e in words.exponents(True)]
    parts = [value * power for value, power in zip(decoded, powers, strict=True)]
    values = jnp.stack(parts, axis=-2).reshape(*lead, -1, columns)
    values = values - layout.bias
    if w.zero is not None:
        zero = words_to_bytes(w.zero)[..., : layout.groups, :].astype(jnp.float32)
        values = values - _over_rows(w, zero, values.shape[-2])
    if w.scale is not None:
        values = values * _over_rows(w, group_scales(w), values.shape[-2])
    if w.column_scale is not None:
        values = values * w.column_scale
    return values[..., : layout.k, : layout.n]


def group_scales(w: KernelWeight) -> Float[Array, "*lead groups n"]:
    """float32 `[..., groups, N']`."""
    packed = w.layout.packed_scale
    if packed is None:
        return w.scale.astype(jnp.float32)
    return packed.decode(packed.unpack(w.scale, w.layout.groups), True)


def _over_rows(w: KernelWeight, a: jax.Array, rows: int) -> jax.Array:
    """`[..., groups, N'] -> [..., rows, N']`."""
    group = w.layout.group or rows
    *lead, groups, columns = a.shape
    wide = jnp.broadcast_to(a[..., :, None, :], (*lead, groups, group, columns))
    return wide.reshape(*lead, groups * group, columns)[..., :rows, :]
