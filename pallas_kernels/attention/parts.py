"""A sequence in parts: how many, which slots each has, and how their results become one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.cache.rounding import nearest_integer
from pallas_kernels.cache.words import CacheWords
from pallas_kernels.device import default_device
from pallas_kernels.mosaic.launch import launch, load, store

LOWEST = -(2**20)
"""Exponent of a part that saw no slot."""

_SMALLEST_PART = 256  # slots; shorter parts do not pay for the second pass
_MOST_PARTS = 128


def choose_parts(programs: int, slots: int, resident: int) -> int:
    """How many programs share a sequence: as many as run at the same time, so that none waits for
    a second turn; or four turns of them, where one would leave more than a quarter of the places
    free.

    Registers allow `resident` programs on a multiprocessor. The multiprocessors are those of the
    device that the trace is for; in the interpreter 4, so that it shares as well. Without sharing
    there are `programs`.
    """
    places = resident * (getattr(default_device(), "core_count", None) or 4)
    parts = places // programs
    if parts * programs < 0.75 * places:
        parts = 4 * places // programs
    return max(1, min(parts, slots // _SMALLEST_PART, _MOST_PARTS))


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Static numbers of one launch; `group` query heads read a KV head, `dtype` is the result's."""

    kv_heads: int
    slots: int
    group: int
    parts: int
    side: CacheWords
    sliding_window: int | None
    scale: float
    dtype: Any

    def part_bounds(self, length, part, tile: int):
        """Slots `first .. end` of one part: the visible ones in equal parts of whole tiles.

        A part beyond the sequence of `length` slots gets `end <= first`.
        """
        first = jnp.int32(0)
        if self.sliding_window is not None:
            first = jnp.maximum(length - jnp.int32(self.sliding_window), 0)
        step = (length - first + (self.parts * tile - 1)) // (self.parts * tile) * tile
        first = first + part * step
        return first, jnp.minimum(first + step, length)


def by_plane(a: jax.Array, side: CacheWords) -> jax.Array:
    """`[..., D]` as `[..., W, J]`; `[..., 1]` as it is."""
    return a if a.shape[-1] == 1 else a.reshape(*a.shape[:-1], side.width, side.planes)


def cache_operands(side: CacheWords, k: CacheArrays, v: CacheArrays):
    """The cache's arrays by name: those that every kernel reads, and the static scale and zero
    point of the values, which only the last step reads.
    """
    arrays = {"k": side.view(k.codes), "v": side.view(v.codes)}
    small = {"k_scale": k.scale, "v_scale": v.scale, "k_zero": k.zero, "v_zero": v.zero}
    if not side.static:
        return arrays | {name: a for name, a in small.items() if a is not None}, {}
    # A static zero point of K adds the same to all scores of a query: no need of it.
    del small["k_zero"]
    given = {n: by_plane(a.astype(jnp.float32), side) for n, a in small.items() if a is not None}
    arrays["k_scale"] = given.pop("k_scale")
    return arrays, given


def launch_parts(
    program: Callable[..., None],
    operands: dict[str, jax.Array],
    static: dict[str, jax.Array],
    shape: AttentionShape,
    side: CacheWords,
    *,
    name: str,
    grid: dict[str, int],
    scratch_types: tuple[Any, ...],
) -> jax.Array:
    """Launches `program(inputs by name, outputs, *scratch)`, and what joins the parts if several.

    A program writes its part's sums, `exponent` and total (see `join_parts`); with one part it does
    `write_output`, and reads `static` (of `cache_operands`) too. `side` has the planes of the sums.
    The axes of `grid` include `part` and `sequence` (B * KH). Returns `[B, H, D]`.
    """
    b, heads = grid["sequence"] // shape.kv_heads, shape.group * shape.kv_heads
    d, parts = side.head_dim, shape.parts
    if parts == 1:
        operands = operands | static
        outputs = [jax.ShapeDtypeStruct((b, heads, side.width, side.planes), shape.dtype)]
    else:
        of_parts = ((d,), jnp.float32), ((), jnp.int32), ((), jnp.float32)
        outputs = [jax.ShapeDtypeStruct((b, heads, parts, *end), kind) for end, kind in of_parts]
    names, last = tuple(operands), len(operands) + len(outputs)

    def kernel(*refs):
        inputs = dict(zip(names, refs[: len(names)], strict=True))
        program(inputs, refs[len(names) : last], *refs[last:])

    kernel.__name__ = name
    out = launch(
        kernel,
        tuple(operands.values()),
        out_type=tuple(outputs),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch_types,
    )
    if parts == 1:
        return out[0].reshape(b, heads, d)
    return join_parts(out[0], out[1], out[2], static, side, shape.dtype)


def exponent(x: jax.Array) -> jax.Array:
    """int32 nearest float32 `x`, no less than `LOWEST`: what `2 ** x` is scaled by.

    Below 2^22. By bits, for T4 lacks the maximum and minimum that a conversion brings along.
    """
    return nearest_integer(jnp.where(x > LOWEST, x, jnp.float32(LOWEST)))


def spread(width: int, lanes: int = 32) -> Any:
    """Layout of `[..., width]`: one element a thread, over as many warps as there are.

    Of a warp, `lanes` threads differ (a power of two, like the width), the others have copies.
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


def write_output(out_ref, planes, total, kv, refs: dict[str, Any], side: CacheWords, dtype):
    """Stores `planes / total` as `[W, J]` (zeros if the total, of probabilities, is 0).

    `planes`, the sums, are J arrays `[W]` in `spread`, or shared memory `[J * W]`. Of `refs`,
    `v_scale` and `v_zero`, `[KH, W, J]` or `[KH, 1]`, are applied for KV head `kv` where static.
    """
    width, layout = side.width, spread(side.width)
    static = {} if side.dynamic else refs
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
    """One softmax `[B, H, D]` of the parts of each sequence; one launch.

    Of each part, `sums` are float32 `[B, H, parts, J * W]`, planes of `2 ** (score - top) * value`,
    `top` an int32 `exponent`, `total` the float32 sum of `2 ** (score - top)`, both
    `[B, H, parts]`; `static` has `v_scale` and `v_zero` where they are static.
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
        largest = functools.reduce(jnp.maximum, tops)
        out = jnp.zeros((d,), jnp.float32)
        denominator = jnp.float32(0)
        for i, one in enumerate(tops):
            weight = jnp.exp2((one - largest).astype(jnp.float32))
            out = out + load(sums_ref.at[(*at, i)], spread(d)) * weight
            denominator = denominator + total_ref[(*at, i)] * weight
        store(planes_ref, out)
        # Only what is static is read by the KV head.
        kv_heads = next((a.shape[0] for a in static.values()), h)
        kv = lax.axis_index("head") // (h // kv_heads)
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
