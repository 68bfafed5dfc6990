"""Which elements of a weight share a scale, and what a scale is rounded to.

A weight `[..., K, N]` is seen as groups `[..., G, g, M]` with one scale `[..., G, M]`: per
tensor `[..., 1, K * N, 1]`, per channel `[..., 1, K, N]`, per group `[..., K / g, g, N]`, per
block `[..., ceil(K / bk), bk * bn, ceil(N / bn)]` with zeros beyond the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fdq.schemes.scheme import WeightSpec
from pallas_kernels.typing import Array, Float, Int, Shaped

# Below the smallest normal float32 a quotient would be flushed to zero on CPUs and GPUs.
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)

_HALVINGS = 7  # of the rows of a group


def check_shape(spec: WeightSpec, k: int, n: int, path: str) -> None:
    """Raises ValueError if `spec` cannot group a `[k, n]` weight."""
    if k < 1 or n < 1:
        raise ValueError(f"{path}: expected a weight [K, N] with K, N >= 1, found [{k}, {n}].")
    group = spec.group_size
    if group is None or k % group == 0:
        return
    fits = [g for g in (256, 128, 64, 32, 16, 8) if k % g == 0]
    options = "use a group size that divides K: " + ", ".join(f"-g{g}" for g in fits)
    if not fits:
        options = "no usual group size divides K, so use one scale per channel"
    raise ValueError(
        f"{path}: K={k} (rows, in-features) is not divisible by group_size={group}; {options}."
    )


def group_rows(spec: WeightSpec, k: int, n: int) -> int:
    """Elements that share one scale in a `[k, n]` weight."""
    if spec.granularity == "tensor":
        return k * n
    return math.prod(spec.block_size) if spec.block_size else spec.group_size or k


def to_groups(w: Shaped[Array, "*m k n"], spec: WeightSpec) -> Shaped[Array, "*m groups g columns"]:
    """`[..., K, N]` -> `[..., G, g, M]`."""
    *lead, k, n = w.shape
    if spec.granularity == "tensor":
        return w.reshape(*lead, 1, k * n, 1)
    if spec.block_size is None:
        group = spec.group_size or k
        return w.reshape(*lead, k // group, group, n)
    bk, bn = spec.block_size
    blocks = jnp.pad(w, [(0, 0)] * len(lead) + [(0, -k % bk), (0, -n % bn)])
    kb, nb = blocks.shape[-2] // bk, blocks.shape[-1] // bn
    blocks = jnp.moveaxis(blocks.reshape(*lead, kb, bk, nb, bn), -1, -2)
    return blocks.reshape(*lead, kb, bk * bn, nb)


def expand(scale: jax.Array, spec: WeightSpec, k: int, n: int) -> jax.Array:
    """`scale` as it multiplies a `[..., k, n]` weight: of that shape per group and per block.

    Written without `jnp.repeat`, which explicit mesh axes refuse.
    """
    if spec.granularity in ("tensor", "channel"):
        return scale
    *lead, rows, columns = scale.shape
    if spec.granularity == "group":
        wide = jnp.broadcast_to(scale[..., :, None, :], (*lead, rows, spec.group_size, columns))
        return wide.reshape(*lead, k, n)
    assert spec.block_size is not None
    bk, bn = spec.block_size
    # Rows, then columns: explicit mesh axes allow merging one pair of axes at a time.
    tall = jnp.broadcast_to(scale[..., :, None, :], (*lead, rows, bk, columns))
    tall = tall.reshape(*lead, rows * bk, columns)[..., :k, :]
    return repeat_last(tall, bn, n)


def repeat_last(a: Float[Array, "*m g"], times: int, size: int) -> Float[Array, "*m k"]:
    """Repeats every element of the last axis `times` times and cuts it at `size`."""
    wide = jnp.broadcast_to(a[..., None], (*a.shape, times))
    return wide.reshape(*a.shape[:-1], -1)[..., :size]


def round_scale(scale: jax.Array, dtype: str, *, empty: float | None = 1.0) -> jax.Array:
    """Rounds a float32 scale to what `dtype` can store, at most the largest finite; float32.

    One too small to divide by (all-zero groups) becomes `empty` (None: the smallest that is not).
    """
    storage = jnp.dtype(dtype)
    if storage == jnp.dtype("float8_e8m0fnu"):
        return power_of_two_above(scale)
    if storage != jnp.dtype("float32"):
        largest = float(ml_dtypes.finfo(storage).max)
        scale = jnp.clip(scale, -largest, largest)
        if storage == jnp.dtype("bfloat16"):
            scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
        else:
            scale = scale.astype(storage).astype(jnp.float32)
    smallest = max(SMALLEST_NORMAL, float(ml_dtypes.finfo(storage).smallest_subnormal))
    empty = smallest if empty is None else empty
    return jnp.where(jnp.abs(scale) >= smallest, scale, jnp.float32(empty))


def power_of_two_above(scale: Float[Array, "*m"]) -> Float[Array, "*m"]:
    """The smallest power of two that is not below a float32 `scale` >= 0 (UE8M0); 1 for zero."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    exponent = jnp.clip(exponent, -126, 127)
    return jnp.where(scale >= SMALLEST_NORMAL, power_of_two(exponent), jnp.float32(1.0))


def power_of_two(exponent: Int[Array, "*m"]) -> Float[Array, "*m"]:
    """Exactly `2.0 ** exponent` in float32, for int32 exponents -126..127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def floor_log2(x: Float[Array, "*m"]) -> Int[Array, "*m"]:
    """Exactly `floor(log2(x))` as int32, for normal positive float32 `x`."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def absolute_maximum(groups: Float[Array, "*m count g n"]) -> Float[Array, "*m count n"]:
    """`[..., G, g, M]` -> `[..., G, M]`."""
    return _reduced(jnp.abs(groups), jnp.maximum, jnp.max)


def total(groups: Float[Array, "*m count g n"]) -> Float[Array, "*m count n"]:
    """`[..., G, g, M]` -> `[..., G, M]`, sums in pairs."""
    return _reduced(groups, jnp.add, jnp.sum)


def _reduced(groups: jax.Array, pair: Callable[..., jax.Array], whole: Any) -> jax.Array:
    """Over the rows of groups.

    A reduction of another axis than the last is a slow loop on CPUs; one of halves is a fused one.
    """
    *lead, g, columns = groups.shape
    halvings = min((g & -g).bit_length() - 1, _HALVINGS)
    if not halvings or columns == 1 or not jax.typeof(groups).sharding.mesh.empty:
        return whole(groups, axis=-2)
    groups = groups.reshape(*lead, g >> halvings, 1 << halvings, columns)
    while groups.shape[-2] > 1:
        half = groups.shape[-2] // 2
        groups = pair(groups[..., :half, :], groups[..., half:, :])
    return whole(groups[..., 0, :], axis=-2)
