"""How ops read a quantized weight without decoding it first: element-wise, a packed unit at a time.

A packed unit is the smallest whole number of bytes that holds whole codes: one byte with 1, 2 or 4
rows of K, or three bytes with 8 rows. ``decode_unit`` turns the bytes of a unit into one float32
array per row, by shifts, masks and conversions only, so that XLA fuses it into whatever consumes
the rows and the decoded weight never reaches memory. Invariant:

``dequantize(q)[k, n] = multiplier * (value[k, n] - zero[k // g, n]) * scale[k // g, n]``
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdq.formats import FORMATS
from fdq.formats.convolutional import GROUP, SHIFTS, unpack_local_scales
from fdq.formats.normal_float import CODEBOOK
from fdq.formats.qtensor import QTensor

_UNITS = {
    "int8": (1, 1),
    "int4": (1, 2),
    "int3": (3, 8),
    "int2": (1, 4),
    "float8_e4m3": (1, 1),
    "float8_e5m2": (1, 1),
    "nf4": (1, 2),
    "mxfp4": (1, 2),
    "mxfp8": (1, 1),
    "nvfp4": (1, 2),
    "cc2": (1, 4),
    "array": (1, 1),
}
"""Bytes (elements of an array) and rows of K in a packed unit."""

_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}

_MULTIPLIERS = {"float8_e4m3": 2.0**8, "mxfp8": 2.0**8, "mxfp4": 2.0**14, "nvfp4": 2.0**14}
"""What ``decode_unit`` leaves out: small floats are read as float16 bits, whose exponents are
offset by 8 (e4m3) or 14 (e2m1)."""


@dataclasses.dataclass(frozen=True)
class WeightView:
    """A quantized ``[K, N]`` weight as ops read it.

    Attributes:
      codes: ``[units * unit_bytes, N]`` uint8 (int8 for ``int8``).
      scale: float32 ``[G, N]`` or ``[G, 1]``, everything that multiplies folded in.
      zero: float32 of the shape of ``scale``, or None.
      affine: of ``cc2``, float32 ``[1, N]`` each: the code scale as a sum of two numbers whose
        products with a code are exact, and the code offset; else None.
      kind: name of the format, or ``array`` for floats, whose ``codes`` are the values.
      offset: what ``decode_unit`` subtracts from an unsigned code (8 for plain int4).
      group: rows of K that share a scale.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    affine: tuple[jax.Array, ...] | None
    kind: str
    offset: float
    group: int

    @property
    def unit_bytes(self) -> int:
        """Bytes in a packed unit."""
        return _UNITS[self.kind][0]

    @property
    def unit_rows(self) -> int:
        """Rows of K in a packed unit."""
        return _UNITS[self.kind][1]

    @property
    def units(self) -> int:
        """Packed units in a column."""
        return self.codes.shape[-2] // self.unit_bytes

    @property
    def rows(self) -> int:
        """Rows of K, the unused rows of the last unit and block included."""
        return self.units * self.unit_rows

    @property
    def columns(self) -> int:
        """Output channels N."""
        return self.codes.shape[-1]

    @property
    def multiplier(self) -> float:
        """A constant power of two that multiplies every value."""
        return _MULTIPLIERS.get(self.kind, 1.0)

    @property
    def is_integer(self) -> bool:
        """True when values are integers (or integers and a half), exact in integer arithmetic."""
        return self.kind in _BITS

    def slice_columns(self, start: Any, width: int) -> WeightView:
        """The view of columns ``start .. start + width``; ``start`` may be traced."""

        def cut(a):
            if a is None or a.shape[-1] == 1:
                return a
            return lax.dynamic_slice_in_dim(a, start, width, axis=-1)

        return dataclasses.replace(
            self,
            codes=cut(self.codes),
            scale=cut(self.scale),
            zero=cut(self.zero),
            affine=None if self.affine is None else tuple(cut(a) for a in self.affine),
        )


jax.tree_util.register_dataclass(
    WeightView,
    data_fields=["codes", "scale", "zero", "affine"],
    meta_fields=["kind", "offset", "group"],
)


def _as_bytes(codes: jax.Array) -> jax.Array:
    """Float8 codes as the bytes that hold them."""
    if codes.dtype.itemsize == 1 and not jnp.issubdtype(codes.dtype, jnp.integer):
        return lax.bitcast_convert_type(codes, jnp.uint8)
    return codes


def _repeat_last(a: jax.Array, times: int, size: int) -> jax.Array:
    """Repeats every element of the last axis ``times`` times and cuts it at ``size``."""
    wide = jnp.broadcast_to(a[..., None], (*a.shape, times))
    return wide.reshape(*a.shape[:-1], -1)[..., :size]


def view_weight(q: QTensor) -> WeightView | None:
    """The element-wise view of a canonical ``[K, N]`` QTensor, or None where there is none.

    There is none where a packed unit holds rows of two groups (a group of 6 rows of 3-bit codes);
    such weights are decoded by ``fdq.dequantize``.
    """
    spec = q.spec
    kind = spec.format
    codes = _as_bytes(q.codes)
    n = codes.shape[-1]
    unit_bytes, unit_rows = _UNITS[kind]
    rows = codes.shape[-2] // unit_bytes * unit_rows
    zero = q.zero.astype(jnp.float32) if spec.zero_point == "integer" else None
    offset = 0.0
    if kind in _BITS and kind != "int8" and spec.zero_point != "integer":
        offset = 2.0 ** (_BITS[kind] - 1) - (0.5 if spec.zero_point == "half" else 0.0)
    elif kind == "int8" and spec.zero_point == "half":
        offset = -0.5
    affine = None
    scale = _effective_scale(q)
    if spec.granularity in ("tensor", "channel"):
        group = rows
    elif spec.granularity == "block":
        assert spec.block_size is not None
        group = spec.block_size[0]
        # Repeated in memory (K / 128 rows): an index n // 128 inside a fusion stops vectorization.
        scale = lax.optimization_barrier(_repeat_last(scale, spec.block_size[1], n))
        missing = scale.shape[-2] * group - rows
        if missing:
            codes = jnp.pad(codes, [(0, missing // unit_rows * unit_bytes), (0, 0)])
    else:
        # Derived from the arrays: a spec's group size is the same on a shard, K is not.
        group = (rows - q.padding) // scale.shape[-2]
        if group % unit_rows and scale.shape[-2] > 1:
            return None
        if scale.shape[-2] == 1:
            group = rows
    if kind == "cc2":
        bits = lax.bitcast_convert_type(q.code_scale, jnp.uint32) & jnp.uint32(0xFFFFF000)
        high = lax.bitcast_convert_type(bits, jnp.float32)
        affine = (high, q.code_scale - high, q.code_offset)
    return WeightView(codes, scale, zero, affine, kind, offset, group)


def view_array(w: jax.Array) -> WeightView:
    """The view of a float ``[K, N]`` array."""
    one = jnp.ones((1, 1), jnp.float32)
    return WeightView(w, one, None, None, "array", 0.0, w.shape[0])


def _effective_scale(q: QTensor) -> jax.Array:
    """Float32 ``[G, N]`` (blocks not repeated): the product of everything that multiplies."""
    if q.spec.format == "cc2":
        local = unpack_local_scales(q.scale, q.shape[-2] // GROUP)
        return local.astype(jnp.float32) * q.super_scale
    arrays = q.arrays()
    if q.scale.dtype == jnp.float8_e4m3fn:
        # XLA's own conversion is a slow sequence of selects.
        arrays["scale"] = e4m3_values(lax.bitcast_convert_type(q.scale, jnp.uint8)) * jnp.float32(
            _MULTIPLIERS["float8_e4m3"]
        )
    multiplier = getattr(FORMATS[q.spec.format], "multiplier")  # noqa: B009, not of every Format
    return multiplier(arrays, q.spec)


def _from_float16_bits(bits: jax.Array) -> jax.Array:
    # Hardware converts float16 subnormals right even where float32 subnormals are flushed to zero.
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def e4m3_values(codes: jax.Array) -> jax.Array:
    """uint8 holding float8_e4m3fn -> float32 values divided by 2^8; exact (NaN becomes 480)."""
    wide = codes.astype(jnp.uint16)
    sign = (wide & jnp.uint16(0x80)) << jnp.uint16(8)
    return _from_float16_bits(sign | (wide & jnp.uint16(0x7F)) << jnp.uint16(7))


def _select_level(nibble: jax.Array, levels: np.ndarray) -> jax.Array:
    """``levels[nibble]`` by a tree of selects, which fuses and vectorizes."""
    values = [jnp.float32(v) for v in levels]
    for bit in range(4):
        odd = (nibble >> jnp.uint8(bit)) & jnp.uint8(1) != 0
        values = [jnp.where(odd, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0]


def decode_unit(view: WeightView, unit: list[jax.Array], affine=None) -> list[jax.Array]:
    """Values of the rows of a packed unit, before ``zero``, ``scale`` and ``multiplier``.

    Args:
      view: says which format.
      unit: ``unit_bytes`` arrays of one shape.
      affine: ``view.affine`` in a shape that broadcasts to that one.

    Returns:
      ``unit_rows`` float32 arrays of that shape.
    """
    kind, b = view.kind, unit[0]
    if kind in ("int8", "array"):
        values = [b.astype(jnp.float32)]
    elif kind in _BITS:
        values = [c.astype(jnp.float32) for c in unsigned_rows(view, unit)]
    elif kind in ("float8_e4m3", "mxfp8"):
        return [e4m3_values(b)]
    elif kind == "float8_e5m2":
        return [_from_float16_bits(b.astype(jnp.uint16) << jnp.uint16(8))]
    elif kind in ("mxfp4", "nvfp4"):
        values = []
        for nibble in (b & jnp.uint8(15), b >> jnp.uint8(4)):
            wide = nibble.astype(jnp.uint16)
            sign = (wide & jnp.uint16(8)) << jnp.uint16(12)
            values.append(_from_float16_bits(sign | (wide & jnp.uint16(7)) << jnp.uint16(9)))
        return values
    elif kind == "nf4":
        return [_select_level(c, CODEBOOK) for c in (b & jnp.uint8(15), b >> jnp.uint8(4))]
    elif kind == "cc2":
        assert view.affine is not None
        high, low, offset = view.affine if affine is None else affine
        code = b.astype(jnp.float32)
        # Both products are exact: fused or not, the sum is rounded as in the definition.
        state = jnp.floor(code * high + code * low + offset + 0.5).astype(jnp.int32)
        windows = [(state >> jnp.int32(s)) & jnp.int32(63) for s in SHIFTS]
        return [w.astype(jnp.float32) - 32.0 for w in windows]
    else:
        raise ValueError(f"No element-wise decoding for weight format {kind!r}.")
    return [v - view.offset for v in values] if view.offset else values


def unsigned_rows(view: WeightView, unit: list[jax.Array]) -> list[jax.Array]:
    """Stored codes of the rows of a unit of an integer format: uint8, or int8 for ``int8``."""
    b = unit[0]
    if view.kind == "int8":
        return [b]
    if view.kind == "int4":
        return [b & jnp.uint8(15), b >> jnp.uint8(4)]
    if view.kind == "int2":
        return [(b >> jnp.uint8(2 * i)) & jnp.uint8(3) for i in range(4)]
    word = functools.reduce(
        lambda a, c: a | c, (u.astype(jnp.uint32) << jnp.uint32(8 * i) for i, u in enumerate(unit))
    )
    return [((word >> jnp.uint32(3 * i)) & jnp.uint32(7)).astype(jnp.uint8) for i in range(8)]


def decode_planes(view: WeightView, *, with_scale: bool = True) -> list[jax.Array]:
    """The weight as ``unit_rows`` float32 planes; plane ``p`` holds rows ``p, p + unit_rows, ...``.

    Planes instead of one matrix: interleaving rows costs a copy, taking every P-th column of x
    costs nothing.

    Args:
      view: of a ``[K, N]`` weight.
      with_scale: False leaves out scale and multiplier, but not the zero point.

    Returns:
      ``unit_rows`` arrays ``[units, N]``.
    """
    shape = (view.units, view.unit_bytes, view.columns)
    codes = view.codes.reshape(shape)
    planes = decode_unit(view, [codes[:, i] for i in range(view.unit_bytes)])
    groups = view.scale.shape[-2]
    per_group = (groups, view.units // groups, view.columns)

    def finish(plane):
        plane = plane.reshape(per_group)
        if view.zero is not None:
            plane = plane - view.zero[:, None, :]
        if with_scale:
            plane = plane * (view.scale * view.multiplier)[:, None, :]
        return plane.reshape(view.units, view.columns)

    return [finish(plane) for plane in planes]
