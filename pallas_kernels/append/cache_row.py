"""The kernel of `cache_update.append`: one head of one sequence, from projection to cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from pallas_kernels.attention.parts import spread
from pallas_kernels.cache.arrays import CacheArrays
from pallas_kernels.cache.rounding import nearest_integer, rounding
from pallas_kernels.cache.words import CacheWords
from pallas_kernels.mosaic.launch import launch, load, store


@dataclasses.dataclass(frozen=True)
class Row:
    """Static numbers of one launch."""

    heads: int
    kv_heads: int
    slots: int
    side: CacheWords
    interleaved: bool
    epsilon: float
    dtype: Any  # of activations
    splits: int | None  # partial sums of qkv

    @property
    def head_dim(self) -> int:
        """D."""
        return self.side.head_dim

    @property
    def pieces(self) -> tuple[int, ...]:
        """Axes that a head's channels are read as: pairs, and pairs of pairs of its halves."""
        return (self.head_dim // 2, 2) if self.interleaved else (2, self.head_dim // 4, 2)

    @property
    def indices(self) -> list[tuple[Any, ...]]:
        """The pieces of a head: even and odd channels (interleaved), or those of each half."""
        if self.interleaved:
            return [(slice(None), p) for p in range(2)]
        return [(h, slice(None), p) for h in range(2) for p in range(2)]

    @property
    def width(self) -> int:
        """Channels of a piece."""
        return self.head_dim // len(self.indices)

    @property
    def layout(self) -> Any:
        """Of a piece. A maximum over all 32 threads of a warp is an instruction that T4 lacks."""
        return spread(self.width, 16)


@functools.partial(jax.jit, static_argnames=("shape",))
def write_row(shape: Row, qkv, cos, sin, slots, k: CacheArrays, v: CacheArrays, kept):
    """Launches the kernel; returns the queries, and by name what was written of keys and values."""
    bias, q_norm, k_norm = kept
    batch, dynamic = k.codes.shape[0], shape.side.dynamic
    total = shape.heads + 2 * shape.kv_heads

    def by_piece(a):  # [..., D] as pieces; [..., 1] as it is
        return a if a.shape[-1] == 1 else a.reshape(*a.shape[:-1], *shape.pieces)

    def by_head(a):  # [..., heads * D]
        return by_piece(a.reshape(*a.shape[:-1], total, shape.head_dim))

    operands = {"qkv": by_head(qkv), "slots": slots}
    angles = shape.pieces[-2:-1] if shape.interleaved else shape.pieces[1:]
    operands |= {"cos": cos.reshape(batch, *angles), "sin": sin.reshape(batch, *angles)}
    for name, a in (("bias", bias), ("q_norm", q_norm), ("k_norm", k_norm)):
        if a is not None:
            operands[name] = by_head(a) if name == "bias" else by_piece(a)
    # Where codes are packed, an element is the last axis of pieces.
    code_shape = shape.pieces[:-1] if shape.side.packed > 1 else shape.pieces
    written = {"k": k.codes, "v": v.codes}
    small = {"k_scale": k.scale, "v_scale": v.scale, "k_zero": k.zero, "v_zero": v.zero}
    small = {name: a for name, a in small.items() if a is not None}
    views = {n: a.reshape(*a.shape[:3], *code_shape) for n, a in written.items()}
    if dynamic:
        written |= small
        views |= small
    else:
        operands |= {name: by_piece(a.astype(jnp.float32)) for name, a in small.items()}
    cells = {name: jax.new_ref(a) for name, a in views.items()}
    names = (*operands, *cells)

    def append_kernel(*refs):
        _program(shape, dict(zip(names, refs[:-1], strict=True)), refs[-1])

    everything: Any = (*operands.values(), *cells.values())  # arrays, and references to arrays
    q = launch(
        append_kernel,
        everything,
        out_type=jax.ShapeDtypeStruct((batch, shape.heads, *shape.pieces), shape.dtype),
        grid=(total, batch),
        grid_names=("head", "sequence"),
    )
    after = {name: jax.freeze(cell).reshape(written[name].shape) for name, cell in cells.items()}
    return q.reshape(batch, shape.heads, shape.head_dim), after


def _program(shape: Row, refs: dict[str, Any], q_ref) -> None:
    """One head of one sequence."""
    head, b = lax.axis_index("head"), lax.axis_index("sequence")
    layout = shape.layout
    rounded = rounding(shape.dtype)

    def piece(ref, *where):
        return load(ref.at[where], layout).astype(jnp.float32)

    x = []
    for index in shape.indices:
        if shape.splits is None:
            one = piece(refs["qkv"], b, head, *index)
        else:
            one = piece(refs["qkv"], 0, b, head, *index)
            for i in range(1, shape.splits):
                one = one + piece(refs["qkv"], i, b, head, *index)
        one = rounded(one)
        if "bias" in refs:
            one = rounded(one + rounded(piece(refs["bias"], head, *index)))
        x.append(one)
    slot = jnp.clip(refs["slots"][b], 0, shape.slots - 1)

    def rotated(norm):
        y = x
        if norm in refs:
            squares = jnp.sum(functools.reduce(jnp.add, [one * one for one in x]))
            mean = _splat(shape, squares) / jnp.float32(shape.head_dim)
            inverse = lax.rsqrt(mean + jnp.float32(shape.epsilon))
            y = [
                rounded(one * inverse * piece(refs[norm], *index))
                for one, index in zip(x, shape.indices, strict=True)
            ]
        half = len(y) // 2
        out: list[Any] = [None] * len(y)
        for i in range(half):
            at = (b, slice(None)) if shape.interleaved else (b, slice(None), i)
            cos, sin = (piece(refs[name], *at) for name in ("cos", "sin"))
            first, second = y[i], y[i + half]
            out[i] = rounded(first * cos - second * sin)
            out[i + half] = rounded(second * cos + first * sin)
        return out

    @pl.when(head < shape.heads)
    def _query():
        for one, index in zip(rotated("q_norm"), shape.indices, strict=True):
            store(q_ref.at[(b, head, *index)], one.astype(shape.dtype))

    @pl.when((head >= shape.heads) & (head < shape.heads + shape.kv_heads))
    def _key():
        _write(shape, refs, "k", rotated("k_norm"), (b, head - shape.heads, slot))

    @pl.when(head >= shape.heads + shape.kv_heads)
    def _value():
        _write(shape, refs, "v", x, (b, head - shape.heads - shape.kv_heads, slot))


def _write(shape: Row, refs: dict[str, Any], name: str, x: list[jax.Array], where) -> None:
    """Quantizes the pieces of one key or value and writes codes, scale and zero point."""
    side, kv = shape.side, where[1]
    scales: list[Any] = [None] * len(x)
    zeros = scales
    if side.dynamic:
        wide, zero = side.fit(x, lambda pieces: _largest(shape, pieces))
        refs[f"{name}_scale"][where] = _first(shape, wide)
        scales, zeros = [wide] * len(x), [zero] * len(x)
        if zero is not None:
            point = _first(shape, nearest_integer(zero))
            refs[f"{name}_zero"][where] = point.astype(jnp.uint8)
    elif side.static:
        scales, zeros = (
            [_static(shape, refs.get(f"{name}_{kind}"), kv, index) for index in shape.indices]
            for kind in ("scale", "zero")
        )
    codes = [side.encode(*one) for one in zip(x, scales, zeros, strict=True)]
    indices = shape.indices
    if side.packed > 1:
        indices = [index[:-1] for index in indices[:: side.packed]]
    for one, index in zip(side.pack(codes), indices, strict=True):
        store(refs[name].at[(*where, *index)], one.astype(refs[name].dtype))


def _splat(shape: Row, scalar: jax.Array) -> jax.Array:
    return mg.layout_cast(lax.broadcast_in_dim(scalar, (shape.width,), ()), shape.layout)


def _first(shape: Row, x: jax.Array) -> jax.Array:
    """The scalar that a vector is full of."""
    index = mg.broadcasted_iota(jnp.int32, x.shape, 0, layout=shape.layout)
    return jnp.sum(jnp.where(index == 0, x, jnp.zeros((), x.dtype)))


def _largest(shape: Row, x: list[jax.Array]) -> jax.Array:
    """The largest of non-negative numbers, by their bits: T4 has no maximum of floats."""
    bits = [lax.bitcast_convert_type(one, jnp.int32) for one in x]
    top = functools.reduce(lambda a, b: jnp.where(a > b, a, b), bits)
    return lax.bitcast_convert_type(_splat(shape, jnp.max(top)), jnp.float32)


def _static(shape: Row, ref: Any, kv: jax.Array, index: tuple[Any, ...]):
    """The calibrated scale or zero point of a piece; None where there is none."""
    if ref is None:
        return None
    if len(ref.shape) == 2:
        return _splat(shape, ref[kv, 0])
    return load(ref.at[(kv, *index)], shape.layout)
