"""Attention of one new token per sequence over a quantized KV cache; CUDA cores, every GPU.

    out[b, h] = sum_s softmax_s(scale * q[b, h] . key[b, h // G, s]) * value[b, h // G, s]

A program is 128 threads with one (sequence, KV head), up to four query heads of its group and a
part of the sequence. Eight threads share a slot, 16 slots make a tile, and each of the 16 rows of
threads runs an online softmax of its own over the slots that pass through it: no exchange between
rows until the end, where 16 states become one. The parts of a sequence become one in a second pass,
an XLA fusion; with one part there is none.

Scales never touch the cache: per token they multiply scores and probabilities, per channel or head
the query and the output.
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

from pallas_kernels.cache_words import INT4_MIDDLE, CacheWords, describe_cache
from pallas_kernels.launch import default_device, launch

ROWS = 16
"""Slots of a tile: 128 threads, 8 of them a slot."""

_MASKED = -1e30  # finite: a row that saw no slot must not make NaN of inf - inf
_LOG2_E = math.log2(math.e)
_SMALLEST_PART = 256  # slots; shorter parts do not pay for the second pass


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
      v_scale: as k_scale.
      k_zero: uint8 zero points of the shape of k_scale; int4 only.
      v_zero: as k_zero.
      cache_format: ``int8``, ``float8_e4m3``, ``int4``; None for floats.
      sliding_window: slots that the token sees, its own included; None for all.
      scale: multiplies the scores; ``D ** -0.5`` if None.
      parts: programs that share a sequence; None chooses by the device's multiprocessors.

    Returns:
      ``[B, H, D]`` in the dtype of q; scores, softmax and sums are float32.

    Raises:
      NotImplementedError: a head_dim without a kernel.
      ValueError: arrays that do not belong together.
    """
    b, h, d = q.shape
    side = describe_cache(k, d, cache_format, k_scale)
    _check(q, k, v, cache_format, (k_scale, v_scale), (k_zero, v_zero))
    static = functools.partial(
        _attend,
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


def _check(q, k, v, cache_format, scales, zeros) -> None:
    kh = k.shape[1]
    if k.shape != v.shape or k.dtype != v.dtype or q.shape[0] != k.shape[0] or q.shape[1] % kh:
        raise ValueError(
            f"decode_attention: q {q.shape} needs k and v alike, [B, KH, S, ...] with KH dividing "
            f"H={q.shape[1]}; found k {k.dtype.name} {k.shape} and v {v.dtype.name} {v.shape}."
        )
    shapes = (k.shape[:3], (kh, 1), (kh, q.shape[2]))
    given = [a for a in (*scales, *zeros) if a is not None]
    if any(a.shape not in shapes or (a.ndim == 3) != (given[0].ndim == 3) for a in given):
        raise ValueError(
            "decode_attention: scales and zero points must all be [B, KH, S] or all [KH, D or 1], "
            f"found {[a.shape for a in given]} beside k {k.shape}."
        )
    if (cache_format == "int4") != all(a is not None for a in zeros):
        raise ValueError(
            f"decode_attention: cache_format={cache_format!r}; zero points go with 'int4' and "
            "only there."
        )


def heads_per_program(group: int, head_dim: int) -> int:
    """Query heads of a group that one program attends for: up to four at head_dim 128.

    A head costs head_dim / 4 registers of a thread (queries and sums); a group of 5 is 3 + 2.
    """
    most = max(1, min(4, 512 // head_dim))
    return -(-group // -(-group // most))


def choose_parts(programs: int, slots: int, multiprocessors: int) -> int:
    """How many programs share a sequence, so that every multiprocessor has three of them.

    Args:
      programs: programs without sharing.
      slots: S.
      multiprocessors: of the device.
    """
    wanted = -(-3 * multiprocessors // programs)
    return max(1, min(wanted, slots // _SMALLEST_PART, 64))


def _multiprocessors() -> int:
    """Of the device that the trace is for; 4 in the interpreter, so that it shares as well."""
    return getattr(default_device(), "core_count", None) or 4


def _lanes(vector: int, rows: int = ROWS) -> Any:
    """Layout of ``[rows, W]``: 8 threads of a warp share a row and read ``vector`` words each."""
    return mg.Layout.TILED(
        mg.Tiling(((rows, 8 * vector), (rows // 4, 8 * vector), (vector,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _spread(width: int) -> Any:
    """Layout of ``[..., width]``: one element a thread, over as many warps as there are."""
    lanes = min(width, 32)
    warps = min(width // lanes, 4)
    lane_dims = (-2,) if lanes == 32 else (mg.Replicated(32 // lanes), -2)
    tiling: tuple[tuple[int, ...], ...] = ((lanes,), (1,))
    warp_dims: tuple[Any, ...] = (mg.Replicated(4),)
    if warps > 1:
        tiling = ((warps * lanes,), *tiling)
        warp_dims = (-3,) if warps == 4 else (mg.Replicated(4 // warps), -3)
    return mg.Layout.TILED(mg.Tiling(tiling), warp_dims, lane_dims, -1)


def _load(ref: Any, layout: Any) -> jax.Array:
    return mg.load(ref, layout=layout, optimized=False)


def _store(ref: Any, value: jax.Array) -> None:
    if hasattr(mg, "store"):  # jax 0.12; before, a plain assignment asks for no optimization
        mg.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _attend(q, k, v, lengths, k_scale, v_scale, k_zero, v_zero, *, side, **static) -> jax.Array:
    """Launches the kernel and joins the parts of each sequence."""
    slots = k.shape[2]
    if slots < ROWS:  # a tile does not fit: a cache this small may be copied
        pad = [(0, 0), (0, 0), (0, ROWS - slots)]
        k, v = (jnp.pad(a, [*pad, (0, 0)]) for a in (k, v))
        if side.dynamic:
            padded = [a if a is None else jnp.pad(a, pad) for a in (k_scale, v_scale)]
            k_scale, v_scale = padded
            k_zero, v_zero = [a if a is None else jnp.pad(a, pad) for a in (k_zero, v_zero)]
    return _launch(q, k, v, lengths, k_scale, v_scale, k_zero, v_zero, side=side, **static)


def _launch(
    q, k, v, lengths, k_scale, v_scale, k_zero, v_zero, *, side, sliding_window, scale, parts
) -> jax.Array:
    b, h, d = q.shape
    kh, slots = k.shape[1:3]
    group = h // kh
    heads = heads_per_program(group, d)
    subgroups = -(-group // heads)
    if parts is None:
        parts = choose_parts(subgroups * b * kh, slots, _multiprocessors())
    shape = _Shape(b, kh, slots, group, heads, parts, side, sliding_window, scale, q.dtype)

    def by_plane(a):  # [..., D] as [..., W, J]; [..., 1] as it is
        return a if a.shape[-1] == 1 else a.reshape(*a.shape[:-1], side.width, side.planes)

    operands = {
        "q": by_plane(q),
        "k": side.view(k),
        "v": side.view(v),
        "lengths": lengths,
    }
    if side.format is not None:
        small = {"k_scale": k_scale, "v_scale": v_scale, "v_zero": v_zero}
        if side.dynamic:
            small |= {"k_zero": k_zero}
            operands |= {name: a for name, a in small.items() if a is not None}
        else:
            # A static zero point of K adds the same to all scores of a query: no need of it.
            if parts > 1:
                small = {"k_scale": k_scale}
            wide = {name: a for name, a in small.items() if a is not None}
            operands |= {name: by_plane(a.astype(jnp.float32)) for name, a in wide.items()}
    names = tuple(operands)
    planes, width = side.planes, side.width
    if parts == 1:
        outputs = (jax.ShapeDtypeStruct((b, h, width, planes), q.dtype),)
    else:
        outputs = (
            jax.ShapeDtypeStruct((b, h, parts, planes, width), jnp.float32),
            jax.ShapeDtypeStruct((b, h, parts), jnp.int32),
            jax.ShapeDtypeStruct((b, h, parts), jnp.float32),
        )

    def decode_attention_kernel(*refs):
        inputs = dict(zip(names, refs[: len(names)], strict=True))
        _program(shape, inputs, refs[len(names) : -1], refs[-1])

    out = launch(
        decode_attention_kernel,
        tuple(operands.values()),
        out_type=outputs,
        grid=(subgroups, parts, b * kh),
        grid_names=("heads", "part", "sequence"),
        scratch_types=(mg.SMEM((planes, heads + 1, width), jnp.float32),),
    )
    if parts == 1:
        return out[0].reshape(b, h, d)
    return join_parts(*out, lengths, v_scale, v_zero, side=side, dtype=q.dtype)


def join_parts(sums, top, total, lengths, v_scale, v_zero, *, side: CacheWords, dtype) -> jax.Array:
    """One softmax of the parts of each sequence.

    Args:
      sums: float32 ``[B, H, parts, J, W]``: sums of ``exp2(score - top) * value``.
      top: int32 ``[B, H, parts]``, the largest score as `_ordered` bits.
      total: float32 ``[B, H, parts]``, sum of ``exp2(score - top)``.
      lengths: int32 ``[B]``.
      v_scale: float32; used if static.
      v_zero: uint8 or None; likewise.
      side: the cache.
      dtype: of the result.

    Returns:
      ``[B, H, D]``.
    """
    b, h, parts = top.shape
    # Unrolled, not a reduction over an axis: XLA makes one launch of elementwise operations.
    tops = [_unordered(top[:, :, i]) for i in range(parts)]
    largest = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp2(t - largest) for t in tops]
    denominator = functools.reduce(jnp.add, [w * total[:, :, i] for i, w in enumerate(weights)])
    numerator = functools.reduce(
        jnp.add, [w[:, :, None, None] * sums[:, :, i] for i, w in enumerate(weights)]
    )
    out = numerator / jnp.where(denominator == 0, jnp.float32(1), denominator)[:, :, None, None]
    out = jnp.swapaxes(out, 2, 3).reshape(b, h, side.head_dim)
    if v_scale is not None and not side.dynamic:
        kh = v_scale.shape[0]
        out = out.reshape(b, kh, h // kh, side.head_dim)
        if v_zero is not None:
            out = out + (jnp.float32(INT4_MIDDLE) - v_zero.astype(jnp.float32))[None, :, None, :]
            out = jnp.where((lengths > 0)[:, None, None, None], out, jnp.float32(0))
        out = (out * v_scale.astype(jnp.float32)[None, :, None, :]).reshape(b, h, side.head_dim)
    return out.astype(dtype)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order: T4 has no maximum of floats that passes NaN on."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _unordered(bits: jax.Array) -> jax.Array:
    """Undoes `_ordered`."""
    return lax.bitcast_convert_type(
        jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits), jnp.float32
    )


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static numbers of one launch."""

    batch: int
    kv_heads: int
    slots: int
    group: int  # query heads of a KV head
    heads: int  # of them, those of one program
    parts: int
    side: CacheWords
    sliding_window: int | None
    scale: float
    dtype: Any  # of the result

    @property
    def unrolled(self) -> int:
        """Tiles in flight: four where registers allow it."""
        registers = self.heads * self.side.head_dim // 4
        most = 4 if registers <= 64 and self.side.dtype.itemsize == 1 else 2
        return max(1, min(most, self.slots // ROWS))


def _program(shape: _Shape, inputs: dict[str, Any], outputs: tuple[Any, ...], planes_ref) -> None:
    """One program: `shape.heads` query heads, one KV head, one part of a sequence."""
    side, heads, unrolled = shape.side, shape.heads, shape.unrolled
    width, lanes = side.width, _lanes(side.vector)
    column, row = lanes.reduce(0), lanes.reduce(1)
    tile = ROWS * unrolled
    part = lax.axis_index("part")
    b = lax.axis_index("sequence") // shape.kv_heads
    kv = lax.axis_index("sequence") % shape.kv_heads
    # The last programs of a group whose size is no multiple attend for some heads once more.
    head = kv * shape.group + jnp.minimum(lax.axis_index("heads") * heads, shape.group - heads)
    where = (b, kv, head, part)

    # Slots first .. end of the sequence, in equal parts of whole tiles.
    end = inputs["lengths"][b]
    first = jnp.int32(0)
    if shape.sliding_window is not None:
        first = jnp.maximum(end - jnp.int32(shape.sliding_window), 0)
    step = (end - first + (shape.parts * tile - 1)) // (shape.parts * tile) * tile
    first = first + part * step
    end = jnp.minimum(first + step, end)
    tiles = jnp.maximum(end - first + (tile - 1), 0) // tile

    queries = _load_queries(shape, inputs, where, planes_ref, column)
    rows = mg.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row)

    def across(x):  # [ROWS] -> [ROWS, W]
        return lax.broadcast_in_dim(x, (ROWS, width), (0,))

    def splat(value):
        return mg.layout_cast(jnp.full((ROWS,), value, jnp.float32), row)

    def load(name, start, layout):
        return _load(inputs[name].at[b, kv, pl.ds(start, ROWS)], layout)

    def decode(name, words, start):
        zero = None
        if side.dynamic and side.format == "int4":
            points = load(f"{name}_zero", start, row).astype(jnp.float32)
            zero = across(points + jnp.float32(16))
        return side.decode(words, zero)

    def body(i, carry):
        tops, totals, sums = carry
        start = first + i * tile
        # The last tile starts early enough to be whole: slots seen before are masked.
        base = jnp.minimum(start, shape.slots - tile)
        starts = [base + u * ROWS for u in range(unrolled)]
        key_words = [load("k", at, lanes) for at in starts]
        value_words = [load("v", at, lanes) for at in starts]
        key_scale = value_scale = None
        if side.dynamic:
            key_scale = [load("k_scale", at, row) for at in starts]
            value_scale = [load("v_scale", at, row) for at in starts]
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
                scores[g].append(jnp.where(visible, score, jnp.float32(_MASKED)))
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
        [splat(_MASKED)] * heads,
        [splat(0.0)] * heads,
        [[zero] * side.planes for _ in range(heads)],
    )
    state = lax.fori_loop(0, tiles, body, state)
    for g, (top, total, sums) in enumerate(zip(*state, strict=True)):
        # The 16 rows' states become one.
        largest = jnp.max(_ordered(top))
        level = _unordered(lax.broadcast_in_dim(largest, (ROWS,), ()))
        weight = jnp.exp2(top - mg.layout_cast(level, row))
        total = jnp.sum(total * weight)
        weight = across(weight)
        sums = [jnp.sum(plane * weight, axis=0) for plane in sums]
        _write(shape, inputs, outputs, (b, kv, head + g, part), planes_ref, largest, total, sums)


def _load_queries(shape: _Shape, inputs, where, planes_ref, column) -> list[list[jax.Array]]:
    """For each head, J planes ``[ROWS, W]`` of the query, times the scale and log2(e)."""
    b, kv, head, _ = where
    side, heads = shape.side, shape.heads
    spread = _spread(side.width)
    k_scale = None if side.dynamic else inputs.get("k_scale")
    factor = jnp.float32(shape.scale * _LOG2_E)
    for j in range(side.planes):
        # Strided loads; through shared memory the threads get the words that they own.
        plane = _load(inputs["q"].at[b, pl.ds(head, heads), :, j], spread)
        _store(planes_ref.at[j, pl.ds(0, heads)], plane.astype(jnp.float32) * factor)
        if k_scale is not None and len(k_scale.shape) == 3:
            _store(planes_ref.at[j, heads], _load(k_scale.at[kv, :, j], spread))
    queries = []
    for g in range(heads):
        planes = [_load(planes_ref.at[j, g], column) for j in range(side.planes)]
        if k_scale is not None:
            if len(k_scale.shape) == 3:
                scales = [_load(planes_ref.at[j, heads], column) for j in range(side.planes)]
            else:
                scales = [k_scale[kv, 0]] * side.planes
            planes = [p * s for p, s in zip(planes, scales, strict=True)]
        queries.append([lax.broadcast_in_dim(p, (ROWS, side.width), (1,)) for p in planes])
    return queries


def _write(shape: _Shape, inputs, outputs, where, planes_ref, largest, total, sums) -> None:
    """Stores the state of one head, or, where the sequence has one part, its result."""
    b, kv, head, part = where
    side = shape.side
    if shape.parts > 1:
        sums_ref, top_ref, total_ref = outputs
        for j, plane in enumerate(sums):
            _store(sums_ref.at[b, head, part, j], plane)
        top_ref[b, head, part] = largest
        total_ref[b, head, part] = total
        return
    spread = _spread(side.width)
    for j, plane in enumerate(sums):
        _store(planes_ref.at[j, 0], plane)
    seen = jnp.where(total > 0, jnp.float32(1), jnp.float32(0))
    factor = jnp.float32(1) / jnp.where(total > 0, total, jnp.float32(1))

    def static(name, j):
        ref = inputs[name]
        return ref[kv, 0] if len(ref.shape) == 2 else _load(ref.at[kv, :, j], spread)

    for j in range(side.planes):
        plane = _load(planes_ref.at[j, 0], spread) * factor
        if side.format is not None and not side.dynamic:
            if "v_zero" in inputs:
                plane = plane + (jnp.float32(INT4_MIDDLE) - static("v_zero", j)) * seen
            plane = plane * static("v_scale", j)
        _store(outputs[0].at[b, head, :, j], plane.astype(shape.dtype))
