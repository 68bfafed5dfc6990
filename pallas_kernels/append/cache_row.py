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

from pallas_kernels.attention.parts import TO_INTEGER, TO_INTEGER_BITS, spread
from pallas_kernels.mosaic.launch import launch, load, store

SMALLEST_MAXIMUM = 1e-10
"""Of a token whose numbers are all zero."""

BOUNDS = {"int8": 127.0, "float8_e4m3": 448.0, "int4": 15.0}
"""Largest code: a scale is the largest magnitude (int4: max - min) over this."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Static numbers of one launch."""

    heads: int
    kv_heads: int
    slots: int
    head_dim: int
    interleaved: bool
    format: str | None
    dynamic: bool
    epsilon: float
    dtype: Any  # of activations
    splits: int | None  # partial sums of qkv

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


def write_row(shape: Row, qkv, cos, sin, slots, caches, kept):
    """Launches the kernel; returns the fields of `cache_update.Appended`."""
    k, v, k_scale, v_scale, k_zero, v_zero = caches
    bias, q_norm, k_norm = kept
    batch = k.shape[0]
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
    # Codes of int4 are one byte for two channels.
    packed = shape.format == "int4"
    code_shape = shape.pieces[:-1] if packed else shape.pieces
    written = {"k": k, "v": v}
    views = {n: a.reshape(*a.shape[:3], *code_shape) for n, a in written.items()}
    small = {"k_scale": k_scale, "v_scale": v_scale, "k_zero": k_zero, "v_zero": v_zero}
    given = {name: a for name, a in small.items() if a is not None}
    if shape.dynamic:
        views |= given
    else:
        operands |= {name: by_piece(a.astype(jnp.float32)) for name, a in given.items()}
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
    after = {name: jax.freeze(cell) for name, cell in cells.items()}
    fields = [after[n].reshape(a.shape) for n, a in written.items()]
    fields += [after.get(name, a) for name, a in small.items()]
    return (q.reshape(batch, shape.heads, shape.head_dim), *fields)


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
    codes_ref = refs[name]
    kv = where[1]
    if shape.format is None:
        for one, index in zip(x, shape.indices, strict=True):
            store(codes_ref.at[(*where, *index)], one.astype(codes_ref.dtype))
        return
    bound = jnp.float32(BOUNDS[shape.format])
    scales: Any
    zeros: Any
    if shape.dynamic:
        wide, zero = _dynamic(shape, x, bound)
        refs[f"{name}_scale"][where] = _first(shape, wide)
        scales, zeros = [wide] * len(x), [zero] * len(x)
        if zero is not None:
            point = _first(shape, _integer(zero))
            refs[f"{name}_zero"][where] = point.astype(jnp.uint8)
    else:
        scales, zeros = (
            [_static(shape, refs.get(f"{name}_{kind}"), kv, index) for index in shape.indices]
            for kind in ("scale", "zero")
        )
    codes = []
    for one, scale, zero in zip(x, scales, zeros, strict=True):
        y = quotient(one, scale)
        if shape.format == "float8_e4m3":
            codes.append(_e4m3_bits(_clip(y, -bound, bound)))
        elif zero is not None:
            near = _clip(y, jnp.float32(-32), jnp.float32(32))
            codes.append(_clip(_integer(near) + _integer(zero), jnp.int32(0), jnp.int32(15)))
        else:
            codes.append(_integer(_clip(y, -bound, bound)))
    if shape.format == "int4":
        # Neighbouring channels are neighbouring pieces in either order of rotation.
        for i in range(0, len(codes), 2):
            at = shape.indices[i][:-1]
            byte = codes[i] | codes[i + 1] << jnp.int32(4)
            store(codes_ref.at[(*where, *at)], byte.astype(jnp.uint8))
        return
    for one, index in zip(codes, shape.indices, strict=True):
        store(codes_ref.at[(*where, *index)], one.astype(codes_ref.dtype))


def rounding(dtype: Any):
    """Rounds float32 to ``dtype`` and back."""
    return lambda x: x.astype(dtype).astype(jnp.float32)


def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b`` rounded once: XLA multiplies by the reciprocal of what it sees is a broadcast."""
    return a / jnp.where(a != a, a, b)


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


def _dynamic(shape: Row, x: list[jax.Array], bound: jax.Array):
    """Scale and zero point (or None) of one token, as vectors."""
    none = jnp.float32(0)
    if shape.format == "int4":
        high = _largest(shape, [jnp.where(one > 0, one, none) for one in x])
        low = _largest(shape, [jnp.where(one < 0, -one, none) for one in x])
        wide = quotient(_at_least(high + low, SMALLEST_MAXIMUM), bound)
        return wide, _clip(_float(_integer(quotient(low, wide))), none, jnp.float32(15))
    largest = _largest(shape, [jnp.abs(one) for one in x])
    return quotient(_at_least(largest, SMALLEST_MAXIMUM), bound), None


def _static(shape: Row, ref: Any, kv: jax.Array, index: tuple[Any, ...]):
    """The calibrated scale or zero point of a piece; None where there is none."""
    if ref is None:
        return None
    if len(ref.shape) == 2:
        return _splat(shape, ref[kv, 0])
    return load(ref.at[(kv, *index)], shape.layout)


def _at_least(x: jax.Array, least: float) -> jax.Array:
    return jnp.where(x > least, x, jnp.float32(least))


def _clip(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    x = jnp.where(x > high, high, x)
    return jnp.where(x < low, low, x)


def _integer(x: jax.Array) -> jax.Array:
    """float32 below 2^22 -> the nearest int32, ties to even."""
    bits = lax.bitcast_convert_type(x + jnp.float32(TO_INTEGER), jnp.int32)
    return bits - jnp.int32(TO_INTEGER_BITS)


def _float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _e4m3_bits(y: jax.Array) -> jax.Array:
    """float32 up to 448 -> int32 with the bits of float8_e4m3fn, rounded to nearest even."""
    bits = lax.bitcast_convert_type(y, jnp.int32)
    sign = (bits >> jnp.int32(24)) & jnp.int32(0x80)
    bits = bits & jnp.int32(0x7FFFFFFF)
    # 20 bits of the mantissa go, and 120 of the exponent's bias.
    odd = (bits >> jnp.int32(20)) & jnp.int32(1)
    normal = ((bits + jnp.int32(0x7FFFF) + odd) >> jnp.int32(20)) - jnp.int32(120 << 3)
    small = _integer(lax.bitcast_convert_type(bits, jnp.float32) * jnp.float32(512))
    return sign | jnp.where(bits < jnp.int32(0x3C800000), small, normal)  # below 2^-6
