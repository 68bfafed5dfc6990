"""Floats of 4 and 8 bits as levels: e2m1, e4m3 and e5m2, and formats whose levels they are.

e2m1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, the sign in bit 3; e4m3 ends at 448 and
e5m2 at 57344. All saturate (JAX's own casts overflow to NaN). Their bits are read as those of a
float16, whose exponents are offset by a constant: exact, and fast where conversions are not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import packing
from fdq.formats.format import ScaledFormat, Tables, Unit
from fdq.schemes.scheme import WeightSpec


class Float8:
    """A float8 dtype of JAX."""

    bits = 8

    def __init__(self, dtype: Any, factor: float):
        self.dtype = dtype
        self.largest = float(jnp.finfo(dtype).max)
        self.factor = factor

    def nearest(self, u: jax.Array) -> jax.Array:
        """The number nearest to `u`, ties to even, saturating; float32."""
        clipped = jnp.clip(u, -self.largest, self.largest)
        return clipped.astype(self.dtype).astype(jnp.float32)

    def to_codes(self, levels: jax.Array) -> jax.Array:
        """Such numbers as float32 -> as they are stored."""
        return levels.astype(self.dtype)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        """As they are stored -> float32."""
        return codes.astype(jnp.float32)

    def from_bits(self, bits: jax.Array) -> jax.Array:
        """uint8 that holds them -> float32 values divided by `factor` (e4m3's NaN is 480)."""
        if self.dtype == jnp.float8_e5m2:
            return _from_float16_bits(bits.astype(jnp.uint16) << jnp.uint16(8))
        return e4m3_values(bits)


class Float4:
    """e2m1, whose codes are uint8 0..15."""

    bits = 4
    largest = 6.0
    factor = 2.0**14

    def nearest(self, u: jax.Array) -> jax.Array:
        """The number nearest to `u`, ties to even mantissas, saturating; float32."""
        magnitude = jnp.minimum(jnp.abs(u), jnp.float32(self.largest))
        one = jnp.float32(1.0)
        step = jnp.where(magnitude < 2.0, 0.5, jnp.where(magnitude < 4.0, one, 2.0))
        inverse = jnp.where(magnitude < 2.0, 2.0, jnp.where(magnitude < 4.0, one, 0.5))
        return jnp.sign(u) * (jnp.round(magnitude * inverse) * step)

    def to_codes(self, levels: jax.Array) -> jax.Array:
        """Such numbers as float32 -> their 4 bits, uint8."""
        magnitude = jnp.abs(levels)
        doubled = jnp.where(magnitude < 4.0, magnitude + 2.0, 0.5 * magnitude + 4.0)
        index = jnp.where(magnitude < 2.0, 2.0 * magnitude, doubled)
        return index.astype(jnp.uint8) | ((levels < 0).astype(jnp.uint8) << jnp.uint8(3))

    def from_codes(self, codes: jax.Array) -> jax.Array:
        """4 bits, uint8 -> float32."""
        return self.from_bits(codes) * jnp.float32(self.factor)

    def from_bits(self, bits: jax.Array) -> jax.Array:
        """4 bits, uint8 -> float32 values divided by `factor`."""
        wide = bits.astype(jnp.uint16)
        sign = (wide & jnp.uint16(8)) << jnp.uint16(12)
        return _from_float16_bits(sign | (wide & jnp.uint16(7)) << jnp.uint16(9))


E2M1 = Float4()
E4M3 = Float8(jnp.float8_e4m3fn, 2.0**8)
E5M2 = Float8(jnp.float8_e5m2, 1.0)


class FloatLevels(ScaledFormat):
    """A format whose levels are the numbers of a small float."""

    def __init__(self, element: Float4 | Float8):
        self.element = element
        self.bits, self.unit_factor = element.bits, element.factor

    def reach(self, spec: WeightSpec) -> float:
        """The largest number of the small float."""
        return self.element.largest

    def project(self, u: jax.Array, spec: WeightSpec, zero: Any = None) -> jax.Array:
        """The level nearest to `u = w / scale`."""
        return self.element.nearest(u)

    def to_codes(self, levels: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Levels -> codes, not yet packed."""
        return self.element.to_codes(levels)

    def from_codes(self, codes: jax.Array, spec: WeightSpec, zero: Any) -> jax.Array:
        """Inverse of `to_codes`, float32."""
        return self.element.from_codes(codes)

    def decode_unit(self, unit: Unit, spec: WeightSpec, tables: Tables = ()) -> Unit:
        """Levels of the rows of a packed unit, divided by `unit_factor`."""
        return [self.element.from_bits(bits) for bits in packing.unit_codes(unit, self.bits)]


def e4m3_values(codes: jax.Array) -> jax.Array:
    """uint8 holding float8_e4m3fn -> float32 values divided by 2^8; exact (NaN becomes 480)."""
    wide = codes.astype(jnp.uint16)
    sign = (wide & jnp.uint16(0x80)) << jnp.uint16(8)
    return _from_float16_bits(sign | (wide & jnp.uint16(0x7F)) << jnp.uint16(7))


def _from_float16_bits(bits: jax.Array) -> jax.Array:
    # Hardware converts float16 subnormals right even where float32 subnormals are flushed to zero.
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
