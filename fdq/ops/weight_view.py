"""How ops read a quantized weight without decoding it first: element-wise, a packed unit at a time.

`Format.decode_unit` turns the bytes of a unit (one with 1, 2 or 4 rows of K, or three with 8) into
a float32 array per row, so that XLA fuses it into whatever consumes the rows. Invariant:

`dequantize(q)[k, n] = unit_factor * (value[k, n] - zero[k // g, n]) * scale[k // g, n] (+ offset)`
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats import FORMATS, grouping
from fdq.formats.format import Format, Tables, Unit
from fdq.formats.packing import unit_codes
from fdq.formats.qtensor import QTensor
from fdq.ops.dots import exact_dot
from fdq.schemes.scheme import WeightSpec

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight
    from pallas_kernels.weights.layout import WeightLayout


class _Floats:
    """The values themselves, one a unit: what the view of an array reads."""

    name = "array"
    unit = (1, 1)
    unit_factor = 1.0

    def decode_unit(self, unit: Unit, spec: Any, tables: Any = ()) -> Unit:
        return [unit[0].astype(jnp.float32)]

    def integer_offset(self, spec: Any) -> None:
        return None


_FLOATS = _Floats()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightView:
    """A quantized `[K, N]` weight as ops read it; `spec` is None for the view of an array.

    `codes` are `[units * unit_bytes, N]` uint8 (int8 for `int8`; floats of an array), `scale`, with
    all that multiplies folded in, `zero` and `offset` float32 `[G, N]` or `[G, 1]`, `tables`
    `[1, N]` each.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    tables: Tables
    format: Any = dataclasses.field(metadata={"static": True})
    spec: WeightSpec | None = dataclasses.field(metadata={"static": True})
    offset: jax.Array | None = None

    @property
    def unit_bytes(self) -> int:
        """Bytes in a packed unit."""
        return self.format.unit[0]

    @property
    def unit_rows(self) -> int:
        """Rows of K in a packed unit."""
        return self.format.unit[1]

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

    def decode_unit(self, unit: Unit, tables: Tables | None = None) -> Unit:
        """Values of the rows of a unit: `Format.decode_unit`, `tables` shaped like the unit."""
        return self.format.decode_unit(unit, self.spec, self.tables if tables is None else tables)

    def unit_codes(self, unit: Unit) -> Unit:
        """Stored codes of the rows of a unit of an integer format."""
        if isinstance(self.format, Format):
            return unit_codes(unit, self.format.bits)
        return self.format.unit_codes(unit)

    def slice_columns(self, start: Any, width: int) -> WeightView:
        """The view of columns `start .. start + width`; `start` may be traced."""

        def cut(a: jax.Array) -> jax.Array:
            return a if a.shape[-1] == 1 else lax.dynamic_slice_in_dim(a, start, width, axis=-1)

        return jax.tree.map(cut, self)

    def slice_units(self, start: Any, count: int) -> WeightView:
        """The view of units `start .. start + count`, whole groups; `start` may be traced."""

        def cut(a: jax.Array, first: Any, rows: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, first, rows, axis=-2)

        bytes = self.unit_bytes
        changes = {"codes": cut(self.codes, start * bytes, count * bytes)}
        groups = self.scale.shape[-2]
        if groups > 1:
            units = self.units // groups
            for name in ("scale", "zero", "offset"):
                if (of_groups := getattr(self, name)) is not None:
                    changes[name] = cut(of_groups, start // units, count // units)
        return dataclasses.replace(self, **changes)


def view_weight(q: QTensor) -> WeightView | None:
    """The view of a canonical `[K, N]` QTensor.

    None where the format has no packed units, or one holds rows of two groups (6 of 3-bit codes).
    """
    spec, arrays = q.spec, q.arrays()
    format = FORMATS[spec.format]
    if format.unit is None:
        return None
    codes = q.codes
    if codes.dtype.itemsize == 1 and not jnp.issubdtype(codes.dtype, jnp.integer):
        codes = lax.bitcast_convert_type(codes, jnp.uint8)  # float8
    n = codes.shape[-1]
    unit_bytes, unit_rows = format.unit
    rows = codes.shape[-2] // unit_bytes * unit_rows
    zero, offset = (
        arrays[name].astype(jnp.float32) if name in arrays else None for name in ("zero", "offset")
    )
    scale = format.multiplier(arrays, spec)
    if spec.granularity == "block":
        assert spec.block_size is not None
        # Repeated in memory (K / 128 rows): an index n // 128 inside a fusion stops vectorization.
        scale = lax.optimization_barrier(grouping.repeat_last(scale, spec.block_size[1], n))
        missing = scale.shape[-2] * spec.block_size[0] - rows
        if missing:
            codes = jnp.pad(codes, [(0, missing // unit_rows * unit_bytes), (0, 0)])
    elif scale.shape[-2] > 1:
        # Derived from the arrays: a spec's group size is the same on a shard, K is not.
        group = (rows - q.padding) // scale.shape[-2]
        if group % unit_rows:
            return None
    return WeightView(codes, scale, zero, format.unit_tables(arrays, spec), format, spec, offset)


def pad_rows(x: jax.Array, view: WeightView) -> jax.Array:
    """Zeros for the unused rows of the weight's last unit: `[M, K] -> [M, view.rows]`."""
    missing = view.rows - x.shape[-1]
    return jnp.pad(x, [(0, 0), (0, missing)]) if missing else x


def add_offsets(y: jax.Array, x: jax.Array, view: WeightView) -> jax.Array:
    """`y [M, N]`, a product without them, plus the offsets by the sums of x over their groups.

    `x [M, view.rows]` are floats or integers.
    """
    if view.offset is None:
        return y
    exact = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    groups = x.astype(exact).reshape(x.shape[0], view.offset.shape[0], -1)
    sums = jnp.sum(groups, axis=-1, dtype=exact)
    return y + exact_dot(sums.astype(jnp.float32), view.offset)


def view_array(w: jax.Array) -> WeightView:
    """The view of a float `[K, N]` array."""
    return WeightView(w, jnp.ones((1, 1), jnp.float32), None, (), _FLOATS, None)


def has_table(view: WeightView) -> bool:
    """Whether a unit is a byte that means the same in every column."""
    return view.unit_bytes == 1 and view.codes.dtype == jnp.uint8 and not view.tables


def decode_planes(view: WeightView, *, with_scale: bool = True, looked_up: bool = False) -> Unit:
    """The weight as `unit_rows` float32 planes `[units, N]`, of rows `p, p + unit_rows, ...` each.

    Not one matrix: interleaving rows costs a copy, taking every P-th column of x costs nothing.
    `with_scale=False` leaves out scale, unit factor and offset, but not zero. With `looked_up` the
    values of a byte come from a table of all 256, where the view has one.
    """
    if looked_up and has_table(view):
        index = view.codes.astype(jnp.int32)
        tables = view.decode_unit([jnp.arange(256, dtype=jnp.uint8)], ())
        planes = [table.at[index].get(mode="promise_in_bounds") for table in tables]
    else:
        codes = view.codes.reshape(view.units, view.unit_bytes, view.columns)
        planes = view.decode_unit([codes[:, i] for i in range(view.unit_bytes)])
    groups = view.scale.shape[-2]
    per_group = (groups, view.units // groups, view.columns)

    def finish(plane):
        plane = plane.reshape(per_group)
        if view.zero is not None:
            plane = plane - view.zero[:, None, :]
        if with_scale:
            plane = plane * (view.scale * view.format.unit_factor)[:, None, :]
            plane = plane if view.offset is None else plane + view.offset[:, None, :]
        return plane.reshape(view.units, view.columns)

    return [finish(plane) for plane in planes]


@dataclasses.dataclass(frozen=True)
class Words:
    """What a view of kernel words asks its format; see `fdq.formats.format.Format`."""

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
        """What `unit_codes`, which are unsigned, are offset by."""
        del spec
        return self.layout.bias

    def unit_codes(self, unit: Unit) -> Unit:
        """The rows of a unit of an integer format, as uint8."""
        return [row.astype(jnp.uint8) for row in self.codes(unit)]

    def codes(self, unit: Unit, tables: Tables = ()) -> Unit:
        """The float32 rows of a unit, as stored: integers unsigned."""
        words = self.layout.words
        constants = [jnp.broadcast_to(a, unit[0].shape) for a in tables]
        rows = words.decode(unit, constants, True)
        last = words.exponent(True)
        exponents = [exponent + last for exponent in words.exponents(True)]
        pairs = zip(rows, exponents, strict=True)
        return [row * jnp.float32(2.0**exponent) if exponent else row for row, exponent in pairs]

    def decode_unit(self, unit: Unit, spec: Any, tables: Any = ()) -> Unit:
        """The float32 rows of a unit, before zero point and scale."""
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
