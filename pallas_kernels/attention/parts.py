"""A sequence in parts: how many, which slots each has, and how their results become one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.cache.rounding import nearest_integer
from pallas_kernels.cache.words import CacheWords
from pallas_kernels.device import default_device
from pallas_kernels.mosaic.launch import launch, load, store

LOWEST = -(2**20)
"""Exponent of a part that saw no slot."""

_SMALLEST_PART = 256  # slots; shorter parts do not pay for the second pass
_MOST_PARTS = 128


def choose_parts(programs: int, slots: int) -> int:
    """How many programs share a sequence, so that every multiprocessor has three of them.

    The multiprocessors are those of the device that the trace is for; in the interpreter 4, so
    that it shares as well.

    Args:
      programs: programs without sharing.
      slots: S.
    """
    multiprocessors = getattr(default_device(), "core_count", None) or 4
    wanted = -(-3 * multiprocessors // programs)
    return max(1, min(wanted, slots // _SMALLEST_PART, _MOST_PARTS))


def part_bounds(length, part, *, parts: int, tile: int, sliding_window: int | None):
    """Slots `first .. end` of one part: the visible ones in equal parts of whole tiles.

    A part beyond the sequence gets `end <= first`.

    Args:
      length: int32 scalar, slots of the sequence.
      part: int32 scalar.
      parts: how many.
      tile: slots that the kernel reads at a time.
      sliding_window: as in `decode_attention`.
    """
    first = jnp.int32(0)
    if sliding_window is not None:
        first = jnp.maximum(length - jnp.int32(sliding_window), 0)
    step = (length - first + (parts * tile - 1)) // (parts * tile) * tile
    first = first + part * step
    return first, jnp.minimum(first + step, length)


def exponent(x: jax.Array) -> jax.Array:
    """int32 nearest float32 `x`, no less than `LOWEST`: what `2 ** x` is scaled by.

    Below 2^22. By bits, for T4 lacks the maximum and minimum that a conversion brings along.
    """
    return nearest_integer(jnp.where(x > LOWEST, x, jnp.float32(LOWEST)))


def spread(width: int, lanes: int = 32) -> Any:
    """Layout of `[..., width]`: one element a thread, over as many warps as there are.

    Args:
      width: a power of two.
      lanes: threads of a warp that differ, a power of two; the others have copies.
    """
    lanes = min(width, lanes)
    warps = min(width // lanes, 4)
    lane_dims = (-2,) if lanes == 32 else (mg.Replicated(32 // lanes), -2)
    tiling: tuple[tuple[int, ...], ...] = ((lanes,), (1,))
    warp_dims: tuple[Any, ...] = (mg.Replicated(4),)
    if warps > 1:
        tiling = ((warps * lanes,), *tiling)
        warp_dims = (-3,) if warps == 4 else (mg.Replicated(4 // warps), -3)
    return mg.Layout.TILED(mg.Tiling(tiling), warp_dims, lane_dims, -1)


def rows_of_threads(rows: int) -> Any:
    """Layout of `[rows, columns]` whose thread has whole rows; columns reduce to `spread`."""
    warps = min(rows // 32, 4)
    warp_dims = (-4,) if warps == 4 else (mg.Replicated(4 // warps), -4)
    return mg.Layout.TILED(mg.Tiling(((warps * 32, 1), (32, 1))), warp_dims, (-2,), -1)


def write_output(out_ref, planes, total, kv, static: dict[str, Any], side: CacheWords, dtype):
    """Stores `planes / total` in the order of channels, with static scales and zero points.

    Args:
      out_ref: `[W, J]`.
      planes: the sums: J arrays `[W]` in `spread`, or shared memory `[J * W]`.
      total: float32 scalar, the sum of the probabilities; 0 gives zeros.
      kv: int32 scalar, the KV head.
      static: refs `v_scale` and `v_zero`, `[KH, W, J]` or `[KH, 1]`, where they are static.
      side: the cache.
      dtype: of the output.
    """
    width, layout = side.width, spread(side.width)
    seen = jnp.where(total == 0, jnp.float32(0), jnp.float32(1))
    factor = jnp.float32(1) / (total + (jnp.float32(1) - seen))

    def of_channel(name, j):
        ref = static[name]
        return ref[kv, 0] if len(ref.shape) == 2 else load(ref.at[kv, :, j], layout)

    if not isinstance(planes, list):
        ref = planes
        planes = [load(ref.at[pl.ds(j * width, width)], layout) for j in range(side.planes)]
    for j, plane in enumerate(planes):
        plane = plane * factor
        if "v_zero" in static:
            plane = plane + (jnp.float32(side.middle) - of_channel("v_zero", j)) * seen
        if "v_scale" in static:
            plane = plane * of_channel("v_scale", j)
        store(out_ref.at[:, j], plane.astype(dtype))


def join_parts(sums, top, total, static: dict[str, jax.Array], side: CacheWords, dtype):
    """One softmax of the parts of each sequence; one launch.

    Args:
      sums: float32 `[B, H, parts, J * W]`: sums of `2 ** (score - top) * value`, planes.
      top: int32 `[B, H, parts]`, an `exponent`.
      total: float32 `[B, H, parts]`, sum of `2 ** (score - top)`.
      static: as for `write_output`.
      side: the cache.
      dtype: of the result.

    Returns:
      `[B, H, D]`.
    """
    b, h, parts = top.shape
    d = side.head_dim
    names = tuple(static)

    def join_parts_kernel(*refs):
        sums_ref, top_ref, total_ref = refs[:3]
        given = dict(zip(names, refs[3:-2], strict=True))
        out_ref, planes_ref = refs[-2:]
        at = lax.axis_index("sequence"), lax.axis_index("head")
        tops = [top_ref[(*at, i)] for i in range(parts)]
        largest = tops[0]
        for one in tops[1:]:
            largest = jnp.maximum(largest, one)
        out = jnp.zeros((d,), jnp.float32)
        denominator = jnp.float32(0)
        for i, one in enumerate(tops):
            weight = jnp.exp2((one - largest).astype(jnp.float32))
            out = out + load(sums_ref.at[(*at, i)], spread(d)) * weight
            denominator = denominator + total_ref[(*at, i)] * weight
        store(planes_ref, out)
        kv = lax.axis_index("head") // (h // _kv_heads(static, h))
        write_output(out_ref.at[at], planes_ref, denominator, kv, given, side, dtype)

    out = launch(
        join_parts_kernel,
        (sums, top, total, *static.values()),
        out_type=jax.ShapeDtypeStruct((b, h, side.width, side.planes), dtype),
        grid=(h, b),
        grid_names=("head", "sequence"),
        scratch_types=(mg.SMEM((d,), jnp.float32),),
    )
    return out.reshape(b, h, d)


def _kv_heads(static: dict[str, jax.Array], heads: int) -> int:
    return next((a.shape[0] for a in static.values()), heads)
