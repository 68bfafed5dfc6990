"""Decode attention on CUDA cores: every GPU, every cache format, and the interpreter.

A program is 128 threads with one (sequence, KV head), up to four query heads of its group and a
part of the sequence. Eight threads share a slot, 16 slots make a tile, and each of the 16 rows of
threads runs an online softmax of its own over the slots that pass through it: no exchange between
rows until the end, where 16 states become one. Query heads beyond four are other programs, which
find the cache in L2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.attention.parts import (
    AttentionShape,
    by_plane,
    cache_operands,
    choose_parts,
    exponent,
    launch_parts,
    spread,
    write_output,
)
from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.cache.words import CacheWords
from pallas_kernels.mosaic.launch import load, store

ROWS = 16
"""Slots of a tile: 128 threads, 8 of them a slot."""

MASKED = -1e30
"""Score of a hidden slot; finite: a row that saw no slot must not make NaN of inf - inf."""

LOG2_E = math.log2(math.e)


def heads_per_program(group: int, head_dim: int) -> int:
    """Query heads of a group that one program attends for: up to four at head_dim 128.

    A head costs head_dim / 4 registers of a thread (queries and sums); a group of 5 is 3 + 2.
    """
    most = max(1, min(4, 512 // head_dim))
    return -(-group // -(-group // most))


@functools.partial(jax.jit, static_argnames=("side", "sliding_window", "scale", "parts"))
def attend(
    q: jax.Array,
    k: CacheArrays,
    v: CacheArrays,
    lengths: jax.Array,
    *,
    side: CacheWords,
    sliding_window: int | None,
    scale: float,
    parts: int | None,
) -> jax.Array:
    """`decode_attention` by the kernel of this file; arguments as there, and checked there."""
    b, h, d = q.shape
    kv_heads, slots = k.codes.shape[1:3]
    if slots < ROWS:  # a tile does not fit: a cache this small may be copied

        def padded(a: jax.Array) -> jax.Array:
            pad = [(0, 0), (0, 0), (0, ROWS - slots), (0, 0)]
            return a if a.ndim == 2 else jnp.pad(a, pad[: a.ndim])

        k, v = jax.tree.map(padded, (k, v))
        slots = ROWS
    group = h // kv_heads
    heads = heads_per_program(group, d)
    subgroups = -(-group // heads)
    if parts is None:
        resident = 4 if heads == 1 else 2  # programs that registers allow on a multiprocessor
        parts = choose_parts(subgroups * b * kv_heads, slots, resident)
    shape = _Shape(kv_heads, slots, group, parts, side, sliding_window, scale, q.dtype, heads)
    operands, static = cache_operands(side, k, v)
    return launch_parts(
        functools.partial(_program, shape),
        operands | {"q": by_plane(q, side), "lengths": lengths},
        static,
        shape,
        side,
        name="decode_attention_kernel",
        grid={"heads": subgroups, "part": parts, "sequence": b * kv_heads},
        scratch_types=(
            mg.SMEM((side.planes, heads + 1, side.width), jnp.float32),
            mg.SMEM((d,), jnp.float32),
        ),
    )


def lanes_of(vector: int, rows: int = ROWS) -> Any:
    """Layout of `[rows, W]`: 8 threads of a warp share a row and read `vector` words each."""
    return mg.Layout.TILED(
        mg.Tiling(((rows, 8 * vector), (rows // 4, 8 * vector), (vector,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


@dataclasses.dataclass(frozen=True)
class _Shape(AttentionShape):
    """Of a launch whose programs have `heads` of a group's query heads."""

    heads: int

    @property
    def unrolled(self) -> int:
        """Tiles in flight: four where registers allow it."""
        registers = self.heads * self.side.head_dim // 4
        most = 4 if registers <= 64 and self.side.dtype.itemsize == 1 else 2
        return max(1, min(most, self.slots // ROWS))


def _program(shape: _Shape, inputs: dict[str, Any], outputs, query_ref, out_planes_ref) -> None:
    """One program: `shape.heads` query heads, one KV head, one part of a sequence."""
    side, heads, unrolled = shape.side, shape.heads, shape.unrolled
    width, lanes = side.width, lanes_of(side.vector)
    column, row = lanes.reduce(0), lanes.reduce(1)
    tile = ROWS * unrolled
    part = lax.axis_index("part")
    b = lax.axis_index("sequence") // shape.kv_heads
    kv = lax.axis_index("sequence") % shape.kv_heads
    # The last programs of a group whose size is no multiple attend for some heads once more.
    head = kv * shape.group + jnp.minimum(lax.axis_index("heads") * heads, shape.group - heads)
    where = (b, kv, head, part)

    first, end = shape.part_bounds(inputs["lengths"][b], part, tile)
    tiles = jnp.maximum(end - first + (tile - 1), 0) // tile

    queries = _load_queries(shape, inputs, where, query_ref, column)
    rows = mg.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row)

    def across(x):  # [ROWS] -> [ROWS, W]
        return lax.broadcast_in_dim(x, (ROWS, width), (0,))

    def splat(value):
        return mg.layout_cast(jnp.full((ROWS,), value, jnp.float32), row)

    def fetch(name, start, layout):
        return load(inputs[name].at[b, kv, pl.ds(start, ROWS)], layout)

    def decode(name, words, start):
        zero = None
        if side.dynamic and side.has_zero:
            points = fetch(f"{name}_zero", start, row).astype(jnp.float32)
            zero = across(side.zero_of(points))
        return side.decode(words, zero)

    def body(i, carry):
        tops, totals, sums = carry
        start = first + i * tile
        # The last tile starts early enough to be whole: slots seen before are masked.
        base = jnp.minimum(start, shape.slots - tile)
        starts = [base + u * ROWS for u in range(unrolled)]
        key_words = [fetch("k", at, lanes) for at in starts]
        value_words = [fetch("v", at, lanes) for at in starts]
        key_scale = value_scale = None
        if side.dynamic:
            key_scale = [fetch("k_scale", at, row) for at in starts]
            value_scale = [fetch("v_scale", at, row) for at in starts]
        scores: list[list[jax.Array]] = [[] for _ in range(heads)]
        for u, at in enumerate(starts):
            slot = rows + at
            visible = (slot >= start) & (slot < end)
            keys = decode("k", key_words[u], at)
            for g in range(heads):
                products = keys[0] * queries[g][0]
                for j in range(1, side.planes):
                    products = products + keys[j] * queries[g][j]
                score = jnp.sum(products, axis=1)
                if key_scale is not None:
                    score = score * key_scale[u]
                scores[g].append(jnp.where(visible, score, jnp.float32(MASKED)))
        new_tops, new_totals, new_sums, weights = [], [], [], []
        for g in range(heads):
            top = tops[g]
            for score in scores[g]:
                top = jnp.where(score > top, score, top)
            shrink = jnp.exp2(tops[g] - top)
            weight = [jnp.exp2(score - top) for score in scores[g]]
            new_tops.append(top)
            new_totals.append(totals[g] * shrink + functools.reduce(jnp.add, weight))
            shrink = across(shrink)
            new_sums.append([plane * shrink for plane in sums[g]])
            if value_scale is not None:
                weight = [w * s for w, s in zip(weight, value_scale, strict=True)]
            weights.append([across(w) for w in weight])
        for u, at in enumerate(starts):
            for j, values in enumerate(decode("v", value_words[u], at)):
                for g in range(heads):
                    new_sums[g][j] = new_sums[g][j] + weights[g][u] * values
        return new_tops, new_totals, new_sums

    zero = mg.layout_cast(jnp.zeros((ROWS, width), jnp.float32), lanes)
    state = (
        [splat(MASKED)] * heads,
        [splat(0.0)] * heads,
        [[zero] * side.planes for _ in range(heads)],
    )
    state = lax.fori_loop(0, tiles, body, state)
    for g, (top, total, sums) in enumerate(zip(*state, strict=True)):
        # The 16 rows' states become one.
        largest = jnp.max(exponent(top))
        level = lax.broadcast_in_dim(largest, (ROWS,), ()).astype(jnp.float32)
        weight = jnp.exp2(top - mg.layout_cast(level, row))
        total = jnp.sum(total * weight)
        weight = across(weight)
        sums = [jnp.sum(plane * weight, axis=0) for plane in sums]
        planes_ref = outputs[0].at[b, head + g, part] if shape.parts > 1 else out_planes_ref
        for j, plane in enumerate(sums):
            store(planes_ref.at[pl.ds(j * width, width)], plane)
        if shape.parts > 1:
            outputs[1][b, head + g, part] = largest
            outputs[2][b, head + g, part] = total
        else:
            out = outputs[0].at[b, head + g]
            write_output(out, planes_ref, total, kv, inputs, side, shape.dtype)


def _load_queries(shape: _Shape, inputs, where, query_ref, column) -> list[list[jax.Array]]:
    """For each head, J planes `[ROWS, W]` of the query, times the scale and log2(e)."""
    b, kv, head, _ = where
    side, heads = shape.side, shape.heads
    layout = spread(side.width)
    k_scale = None if side.dynamic else inputs.get("k_scale")
    factor = jnp.float32(shape.scale * LOG2_E)
    for j in range(side.planes):
        # Strided loads; through shared memory the threads get the words that they own.
        plane = load(inputs["q"].at[b, pl.ds(head, heads), :, j], layout)
        store(query_ref.at[j, pl.ds(0, heads)], plane.astype(jnp.float32) * factor)
        if k_scale is not None and len(k_scale.shape) == 3:
            store(query_ref.at[j, heads], load(k_scale.at[kv, :, j], layout))
    queries = []
    for g in range(heads):
        planes = [load(query_ref.at[j, g], column) for j in range(side.planes)]
        if k_scale is not None:
            if len(k_scale.shape) == 3:
                scales = [load(query_ref.at[j, heads], column) for j in range(side.planes)]
            else:
                scales = [k_scale[kv, 0]] * side.planes
            planes = [p * s for p, s in zip(planes, scales, strict=True)]
        queries.append([lax.broadcast_in_dim(p, (ROWS, side.width), (1,)) for p in planes])
    return queries
