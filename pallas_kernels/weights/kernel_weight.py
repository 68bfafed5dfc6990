"""Weights in the layout that the matrix kernels read, from the canonical one and back, losslessly.

Canonical arrays are those of a checkpoint: codes packed along K as a little-endian bit stream of
each column, scales per channel, group, block or tensor. Kernels read

- `words`: int32 ``[..., W, N']``, units of `WordFormat.words` words, `WordFormat.rows` rows of K;
- `scale`: of a group of rows, ``[..., G', N']``; what is stored in a byte or less stays so, as
  int32 words of consecutive groups of a column;
- `zero`: zero points of a group, four in an int32 word;
- `column_scale`: float32 ``[..., 1, N']``, whatever multiplies a whole column.

N' is N rounded up to 128, and K is rounded up to whole segments (see `WeightLayout.segment`);
padding is zeros.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.weights.word_format import (
    WORD_FORMATS,
    WordFormat,
    bytes_to_words,
    words_to_bytes,
)

COLUMNS = 128
"""N is padded to a multiple of it."""

SEGMENT = 128
"""Most rows of K that a kernel sums before it applies bias, zero point and scale."""

_SUPER_COLUMNS = 256  # columns that share the scale of a scale, in double-quantized nf4

# Scales that stay in a byte or less, and how many of them a word holds.
SCALES_PER_WORD = {"float8_e8m0fnu": 4, "float8_e4m3fn": 4, "uint4": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """What the arrays of a `KernelWeight` stand for; static.

    Attributes:
      format: a key of `WORD_FORMATS`.
      k, n: rows and columns of the weight.
      granularity: ``tensor``, ``channel``, ``group`` or ``block``.
      group_size: rows that share a scale; only with ``group``.
      block_size: rows and columns that share a scale; only with ``block``.
      zero_point: ``none``, ``half`` or ``integer``.
      code_dtype: of the canonical codes.
      scale_dtype: of the canonical scales (``uint4`` for those of cc2).
    """

    format: str
    k: int
    n: int
    granularity: str
    group_size: int | None
    block_size: tuple[int, int] | None
    zero_point: str
    code_dtype: str
    scale_dtype: str

    @property
    def words(self) -> WordFormat:
        """How the codes are read."""
        return WORD_FORMATS[self.format]

    @property
    def group(self) -> int | None:
        """Rows of K that share a scale; None: a whole column does."""
        if self.granularity == "group":
            return self.group_size
        return self.block_size[0] if self.block_size is not None else None

    @property
    def segment(self) -> int:
        """Rows of K that are summed before bias, zero point and scale: a power of two."""
        if self.group is None:
            return SEGMENT
        return min(self.group & -self.group, SEGMENT)

    @property
    def segment_units(self) -> int:
        """Units of the format in a segment."""
        return self.segment // self.words.rows

    @property
    def segments(self) -> int:
        """Segments of a column."""
        return -(-self.k // self.segment)

    @property
    def groups(self) -> int:
        """Groups of a column."""
        return 1 if self.group is None else -(-self.k // self.group)

    @property
    def padded_n(self) -> int:
        """Columns of the kernel's arrays."""
        return -(-self.n // COLUMNS) * COLUMNS

    @property
    def packed_scales(self) -> int:
        """Scales of a group in an int32 word; 0 where they are floats."""
        return SCALES_PER_WORD.get(self.scale_dtype, 0) if self.granularity == "group" else 0

    @property
    def bias(self) -> float:
        """What is subtracted from every decoded code."""
        return self.words.bias(self.zero_point)


@dataclasses.dataclass(frozen=True)
class KernelWeight:
    """A quantized weight ``[..., K, N]`` as the matrix kernels read it; a pytree.

    Attributes:
      words: int32 ``[..., W, N']``.
      scale: ``[..., G, N']`` float, or int32 words of packed scales; None if a column has but one.
      zero: int32 ``[..., ceil(groups / 4), N']``, or None.
      column_scale: float32 ``[..., 1, N']``, or None.
      constants: float32 ``[..., 1, N']`` each, in the order of `WordFormat.columns`.
      kept: canonical arrays that no kernel reads, for the way back.
      layout: what they stand for.
    """

    words: Any
    scale: Any
    zero: Any
    column_scale: Any
    constants: tuple[Any, ...]
    kept: dict[str, Any]
    layout: WeightLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., K, N)``."""
        return (*self.words.shape[:-2], self.layout.k, self.layout.n)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))


jax.tree_util.register_dataclass(
    KernelWeight,
    data_fields=["words", "scale", "zero", "column_scale", "constants", "kept"],
    meta_fields=["layout"],
)


def unsupported(
    format: str,
    *,
    granularity: str,
    group_size: int | None = None,
    block_size: tuple[int, int] | None = None,
) -> str | None:
    """Why no kernel reads such a weight, in one line; None if one does."""
    words = WORD_FORMATS.get(format)
    if words is None:
        return f"format {format!r} has no kernel; there are {', '.join(WORD_FORMATS)}"
    if granularity in ("tensor", "channel") and format in ("cc2", "nvfp4"):
        return f"format {format!r} has scales of groups, found granularity {granularity!r}"
    group = group_size if granularity == "group" else None
    if granularity == "block":
        group = block_size[0] if block_size else None
    if group is not None and group % words.rows:
        return f"groups of {group} rows cut through the {words.rows} rows of a unit of {format}"
    if group is not None and group & -group == words.rows:
        return f"groups of {group} rows have segments of one unit of {format}"
    return None


def to_kernel(
    arrays: dict[str, jax.Array],
    *,
    format: str,
    granularity: str,
    group_size: int | None = None,
    block_size: tuple[int, int] | None = None,
    zero_point: str = "none",
    k: int,
    n: int,
) -> KernelWeight:
    """Canonical arrays -> the kernel's.

    Args:
      arrays: ``codes``, ``scale`` and, where the format has them, ``zero``, ``global_scale``,
        ``code_scale``, ``code_offset``, ``super_scale``, ``scale_offset``, with any leading axes.
      format: of the codes, a key of `WORD_FORMATS`.
      granularity: ``tensor``, ``channel``, ``group`` or ``block``.
      group_size: rows that share a scale; with ``group``.
      block_size: rows and columns that share a scale; with ``block``.
      zero_point: ``none``, ``half`` or ``integer``.
      k: rows.
      n: columns.

    Raises:
      NotImplementedError: no kernel reads such a weight; `unsupported` says why.
      ValueError: arrays that are missing, or are not those of a ``[k, n]`` weight.
    """
    problem = unsupported(
        format, granularity=granularity, group_size=group_size, block_size=block_size
    )
    if problem is not None:
        raise NotImplementedError(f"to_kernel: {problem}; use the canonical layout (XLA).")
    if granularity not in _GRANULARITIES or zero_point not in _ZERO_POINTS:
        raise ValueError(
            f"to_kernel: expected a granularity of {_GRANULARITIES} and a zero_point of "
            f"{_ZERO_POINTS}, found {granularity!r} and {zero_point!r}."
        )
    _check_names(arrays, format, granularity, group_size, block_size, zero_point)
    codes, scale = arrays["codes"], arrays["scale"]
    layout = WeightLayout(
        format=format,
        k=k,
        n=n,
        granularity=granularity,
        group_size=group_size if granularity == "group" else None,
        block_size=block_size if granularity == "block" else None,
        zero_point=zero_point,
        code_dtype=codes.dtype.name,
        scale_dtype="uint4" if format == "cc2" else scale.dtype.name,
    )
    _check_shapes(arrays, layout)
    words = layout.words
    unit_bytes = 4 * words.words
    padded_rows = layout.segments * layout.segment // words.rows * unit_bytes
    kept: dict[str, jax.Array] = {}
    zero = column_scale = None
    constants: tuple[jax.Array, ...] = ()
    if zero_point == "integer":
        zero = bytes_to_words(_pad_rows(_columns(arrays["zero"], layout), 4))
    if format == "cc2":
        constants = tuple(_columns(arrays[name], layout) for name in words.columns)
        column_scale = _columns(arrays["super_scale"], layout)
    elif "super_scale" in arrays:
        kept = {name: arrays[name] for name in ("scale", "super_scale", "scale_offset")}
        step = arrays["super_scale"]
        wide = jnp.broadcast_to(step[..., None], (*step.shape, _SUPER_COLUMNS))
        wide = wide.reshape(*step.shape[:-1], -1)[..., :n]
        scale = scale.astype(jnp.float32) * wide + arrays["scale_offset"]
    elif "global_scale" in arrays:
        kept = {"global_scale": arrays["global_scale"]}
        column_scale = _columns(arrays["global_scale"], layout)
    if layout.group is None:
        scale, column_scale = None, _columns(_to_float32(scale), layout)
    elif layout.packed_scales:
        scale = bytes_to_words(_pad_rows(_columns(scale, layout), 4))
    else:
        scale = _columns(_to_float32(scale) if granularity == "block" else scale, layout)
    return KernelWeight(
        words=words.pack(_pad_columns(_fill_rows(codes, padded_rows), layout)),
        scale=scale,
        zero=zero,
        column_scale=column_scale,
        constants=constants,
        kept=kept,
        layout=layout,
    )


_GRANULARITIES = ("tensor", "channel", "group", "block")
_ZERO_POINTS = ("none", "half", "integer")


def _check_names(
    arrays: dict[str, jax.Array],
    format: str,
    granularity: str,
    group_size: int | None,
    block_size: tuple[int, int] | None,
    zero_point: str,
) -> None:
    """Raises ValueError where arrays or sizes are missing."""
    wanted = ["codes", "scale"]
    if format == "cc2":
        wanted += [*WORD_FORMATS[format].columns, "super_scale"]
    if zero_point == "integer":
        wanted.append("zero")
    missing = [name for name in wanted if name not in arrays]
    if granularity == "group" and not group_size:
        missing.append("group_size")
    if granularity == "block" and not block_size:
        missing.append("block_size")
    if missing:
        raise ValueError(
            f"to_kernel: {format} with granularity={granularity!r} and zero_point={zero_point!r} "
            f"needs {', '.join(missing)}; found {', '.join(arrays)}."
        )
    if zero_point == "integer" and arrays["codes"].dtype == jnp.int8:
        raise ValueError(
            "to_kernel: codes with zero points are unsigned, expected uint8, found int8 codes."
        )


def _check_shapes(arrays: dict[str, jax.Array], layout: WeightLayout) -> None:
    """Raises ValueError where arrays are not those of the weight that the layout describes."""
    k, n, groups = layout.k, layout.n, layout.groups
    rows = _canonical_rows(layout)
    small = groups, n
    if layout.granularity == "tensor":
        small = 1, 1
    elif layout.block_size is not None:
        small = groups, -(-n // layout.block_size[1])
    scale = (-(-groups // 2), n) if layout.scale_dtype == "uint4" else small
    for name, shape in (("codes", (rows, n)), ("scale", scale), ("zero", small)):
        if name in arrays and arrays[name].shape[-2:] != shape:
            raise ValueError(
                f"to_kernel: {name} of a {layout.format} weight [{k}, {n}] with "
                f"{layout.granularity} scales is [..., {shape[0]}, {shape[1]}], found "
                f"{list(arrays[name].shape)}."
            )


def from_kernel(weight: KernelWeight) -> dict[str, jax.Array]:
    """The inverse of `to_kernel`, bit for bit."""
    layout = weight.layout
    words, n = layout.words, layout.n
    rows = _canonical_rows(layout)
    codes = words.unpack(weight.words)[..., :rows, :n]
    if layout.code_dtype == "int8":
        codes = lax.bitcast_convert_type(codes ^ jnp.uint8(0x80), jnp.int8)
    elif layout.code_dtype != "uint8":
        codes = lax.bitcast_convert_type(codes, jnp.dtype(layout.code_dtype))
    arrays = {"codes": codes}
    if "scale" in weight.kept:
        return arrays | weight.kept
    dtype = layout.scale_dtype
    if layout.group is None:
        columns = 1 if layout.granularity == "tensor" else n
        arrays["scale"] = _from_float32(weight.column_scale[..., :columns], dtype)
    elif layout.packed_scales:
        bytes_ = words_to_bytes(weight.scale)[..., :n]
        arrays["scale"] = bytes_[..., : -(-layout.groups * 4 // layout.packed_scales), :]
        if dtype != "uint4":
            arrays["scale"] = lax.bitcast_convert_type(arrays["scale"], jnp.dtype(dtype))
    elif layout.block_size is not None:
        step = layout.block_size[1]
        arrays["scale"] = _from_float32(weight.scale[..., :n:step], dtype)
    else:
        arrays["scale"] = weight.scale[..., :n]
    if weight.zero is not None:
        columns = 1 if layout.granularity == "tensor" else n
        arrays["zero"] = words_to_bytes(weight.zero)[..., : layout.groups, :columns]
    for name, constant in zip(words.columns, weight.constants, strict=True):
        arrays[name] = constant[..., :n]
    if layout.format == "cc2":
        arrays["super_scale"] = weight.column_scale[..., :n]
    return arrays | weight.kept


def _canonical_rows(layout: WeightLayout) -> int:
    """Byte rows of the canonical codes: whole bytes, of 3-bit codes whole units of 8 rows."""
    words = layout.words
    bits = 32 * words.words // words.rows
    return -(-layout.k // 8) * 3 if bits == 3 else -(-layout.k * bits // 8)


def _fill_rows(a: jax.Array, rows: int) -> jax.Array:
    return _pad(a, rows - a.shape[-2], 0)


def _pad_rows(a: jax.Array, multiple: int) -> jax.Array:
    return _pad(a, -a.shape[-2] % multiple, 0)


def _pad_columns(a: jax.Array, layout: WeightLayout) -> jax.Array:
    return _pad(a, 0, layout.padded_n - a.shape[-1])


def _pad(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """Zero bits below and to the right."""
    if not rows and not columns:
        return a
    dtype = a.dtype
    if dtype.itemsize == 1 and dtype not in (jnp.uint8, jnp.int8):
        a = lax.bitcast_convert_type(a, jnp.uint8)
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, rows), (0, columns)])
    return a if a.dtype == dtype else lax.bitcast_convert_type(a, dtype)


def _columns(a: jax.Array, layout: WeightLayout) -> jax.Array:
    """A number for each column and the padding: ``[..., G, 1 or N or blocks] -> [..., G, N']``."""
    if layout.block_size is not None:
        wide = jnp.broadcast_to(a[..., None], (*a.shape, layout.block_size[1]))
        a = wide.reshape(*a.shape[:-1], -1)[..., : layout.n]
    elif a.shape[-1] == 1:
        a = jnp.broadcast_to(a, (*a.shape[:-1], layout.n))
    return _pad_columns(a, layout)


def _to_float32(scale: jax.Array) -> jax.Array:
    if scale.dtype == jnp.float8_e8m0fnu:  # by its bits: 2^-127 would be flushed
        bits = lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
        return lax.bitcast_convert_type(bits << jnp.int32(23), jnp.float32)
    return scale.astype(jnp.float32)


def _from_float32(scale: jax.Array, dtype: str) -> jax.Array:
    if dtype == "float8_e8m0fnu":
        bits = lax.bitcast_convert_type(scale, jnp.int32) >> jnp.int32(23)
        return lax.bitcast_convert_type(bits.astype(jnp.uint8), jnp.dtype(dtype))
    return scale.astype(jnp.dtype(dtype))
