"""Kernel words as plain XLA reads them: a `WeightView` whose packed units are units of words."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fdq.ops.weight_view import WeightView

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight
    from pallas_kernels.weights.layout import WeightLayout


@dataclasses.dataclass(frozen=True)
class Words:
    """What a view asks its format; see `fdq.formats.format.Format`.

    Attributes:
      layout: of the kernel's arrays.
    """

    layout: WeightLayout
    name = "words"
    unit_factor = 1.0

    @property
    def unit(self) -> tuple[int, int]:
        """Words and rows of a unit."""
        return self.layout.words.words, self.layout.words.rows

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.layout.words.bits

    def integer_offset(self, spec: Any) -> float:
        """What `unit_codes` are offset by; 8-bit codes are read as signed."""
        del spec
        signed = self.bits == 8 and self.layout.zero_point != "integer"
        return self.layout.bias - (128.0 if signed else 0.0)

    def unit_codes(self, unit: list[jax.Array]) -> list[jax.Array]:
        """The rows of a unit of an integer format, as uint8."""
        return [row.astype(jnp.uint8) for row in self.codes(unit)]

    def codes(self, unit: list[jax.Array], tables: tuple[jax.Array, ...] = ()) -> list[jax.Array]:
        """The float32 rows of a unit, as stored: integers unsigned."""
        words = self.layout.words
        constants = [jnp.broadcast_to(a, unit[0].shape) for a in tables]
        rows = words.decode(unit, constants, True)
        last = words.exponent(True)
        return [
            row if not exponent + last else row * jnp.float32(2.0 ** (exponent + last))
            for row, exponent in zip(rows, words.exponents(True), strict=True)
        ]

    def decode_unit(self, unit: list[jax.Array], spec: Any, tables: Any = ()) -> list[jax.Array]:
        """The float32 rows of a unit, before zero point and scale."""
        del spec
        bias = self.layout.bias
        return [row - bias if bias else row for row in self.codes(unit, tables)]


def view_words(w: KernelWeight) -> WeightView:
    """The view of a `[K, N]` weight; columns from N on, and rows from K on, are padding."""
    from pallas_kernels.weights.decoded_weight import group_scales
    from pallas_kernels.weights.word_format import words_to_bytes

    layout, codes = w.layout, w.words
    scale = None if w.scale is None else group_scales(w)
    if w.column_scale is not None:
        scale = w.column_scale if scale is None else scale * w.column_scale
    assert scale is not None
    zero = None
    if w.zero is not None:
        zero = words_to_bytes(w.zero)[: layout.groups].astype(jnp.float32)
    missing = layout.groups * (layout.group or 0) - layout.segments * layout.segment
    if missing > 0:
        codes = jnp.pad(codes, [(0, missing // layout.words.rows * layout.words.words), (0, 0)])
    return WeightView(codes, scale, zero, tuple(w.constants), Words(layout), None)
