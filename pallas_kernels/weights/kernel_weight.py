"""Weights in the layout that the matrix kernels read, from the canonical one and back, losslessly.

Canonical arrays are those of a checkpoint: codes packed along K as a little-endian bit stream of
each column, scales per channel, group, block or tensor. Kernels read

- `words`: int32 `[..., W, N']`, units of `WordFormat.words` words, `WordFormat.rows` rows of K;
- `scale`: of a group of rows, `[..., G', N']`; what is stored in a byte or less stays so, as
  int32 words of consecutive groups of a column;
- `zero`: zero points of a group, four in an int32 word;
- `column_scale`: float32 `[..., 1, N']`, whatever multiplies a whole column.

N' is N rounded up to 128, and K is rounded up to whole segments (`WeightLayout.segment`);
padding is zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.weights import scales
from pallas_kernels.weights.formats import WORD_FORMATS
from pallas_kernels.weights.kernel_arrays import KernelWeight as KernelWeight
from pallas_kernels.weights.layout import WeightLayout
from pallas_kernels.weights.word_format import bytes_to_words, words_to_bytes


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
    if words.column_scale is not None and granularity != "group":
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
    """Canonical arrays of a `[k, n]` weight -> the kernel's; settings as in `Stored`.

    Arrays are `codes`, `scale` and, where the format has them, `zero`, `global_scale`,
    `code_scale`, `code_offset`, `super_scale`, `scale_offset`, with any leading axes.

    Raises:
      NotImplementedError: no kernel reads such a weight; `unsupported` says why.
      ValueError: arrays that are missing, or are not those of a `[k, n]` weight.
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
    size = {"group": group_size, "block": block_size}.get(granularity, 1)
    _check_names(arrays, format, granularity, size, zero_point)
    words, codes, scale = WORD_FORMATS[format], arrays["codes"], arrays["scale"]
    layout = WeightLayout(
        format=format,
        k=k,
        n=n,
        granularity=granularity,
        group_size=group_size if granularity == "group" else None,
        block_size=block_size if granularity == "block" else None,
        zero_point=zero_point,
        code_dtype=codes.dtype.name,
        scale_dtype=words.scale_dtype or scale.dtype.name,
    )
    _check_shapes(arrays, layout)
    padded_rows = layout.segments * layout.segment // words.rows * 4 * words.words
    zero = _by_fours(arrays["zero"], layout) if zero_point == "integer" else None
    column_scale = None
    scale, kept = words.merged_scale(arrays, n)
    if words.column_scale is not None:
        column_scale = arrays[words.column_scale]
        if column_scale.shape[-1] != n:
            kept = kept | {words.column_scale: column_scale}
        column_scale = _columns(column_scale, layout)
    if layout.group is None:
        scale, column_scale = None, _columns(scales.to_float32(scale), layout)
    elif layout.packed_scale is not None:
        scale = _by_fours(scale, layout)
    else:
        scale = _columns(scales.to_float32(scale) if granularity == "block" else scale, layout)
    return KernelWeight(
        words=words.pack(_pad(codes, padded_rows, layout.padded_n)),
        scale=scale,
        zero=zero,
        column_scale=column_scale,
        constants=tuple(_columns(arrays[name], layout) for name in words.columns),
        kept=kept,
        layout=layout,
    )


_GRANULARITIES = ("tensor", "channel", "group", "block")
_ZERO_POINTS = ("none", "half", "integer")


def _check_names(
    arrays: dict[str, jax.Array], format: str, granularity: str, size: Any, zero_point: str
) -> None:
    """Raises ValueError where arrays or the size of a group or block are missing."""
    wanted = ["codes", "scale", *WORD_FORMATS[format].extra_shapes(1)]
    if zero_point == "integer":
        wanted.append("zero")
    missing = [name for name in wanted if name not in arrays]
    if not size:
        missing.append(f"{granularity}_size")
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
    k, n = layout.k, layout.n
    for name, shape in layout.canonical_shapes.items():
        if arrays[name].shape[-2:] != shape:
            raise ValueError(
                f"to_kernel: {name} of a {layout.format} weight [{k}, {n}] with "
                f"{layout.granularity} scales is [..., {shape[0]}, {shape[1]}], found "
                f"{list(arrays[name].shape)}."
            )


def from_kernel(weight: KernelWeight) -> dict[str, jax.Array]:
    """The inverse of `to_kernel`, bit for bit."""
    layout = weight.layout
    words, n, dtype = layout.words, layout.n, layout.scale_dtype
    columns = 1 if layout.granularity == "tensor" else n
    codes = words.unpack(weight.words, layout.code_dtype)
    arrays = {"codes": codes[..., : words.code_rows(layout.k), :n]}
    if layout.group is None:
        arrays["scale"] = scales.from_float32(weight.column_scale[..., :columns], dtype)
    elif layout.packed_scale is not None:
        scale = words_to_bytes(weight.scale)[..., : layout.canonical_shapes["scale"][0], :n]
        if words.scale_dtype is None:
            scale = lax.bitcast_convert_type(scale, jnp.dtype(dtype))
        arrays["scale"] = scale
    elif layout.block_size is not None:
        step = layout.block_size[1]
        arrays["scale"] = scales.from_float32(weight.scale[..., :n:step], dtype)
    else:
        arrays["scale"] = weight.scale[..., :n]
    if weight.zero is not None:
        arrays["zero"] = words_to_bytes(weight.zero)[..., : layout.groups, :columns]
    if words.column_scale is not None:
        arrays[words.column_scale] = weight.column_scale[..., :n]
    for name, constant in zip(words.columns, weight.constants, strict=True):
        arrays[name] = constant[..., :n]
    return arrays | weight.kept


def _by_fours(a: jax.Array, layout: WeightLayout) -> jax.Array:
    """Bytes of groups, a number for each column, as words."""
    a = _columns(a, layout)
    return bytes_to_words(_pad(a, -(-a.shape[-2] // 4) * 4, a.shape[-1]))


def _pad(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """Zero bits below and to the right, up to `[..., rows, columns]`."""
    if a.shape[-2:] == (rows, columns):
        return a
    rows, columns, dtype = rows - a.shape[-2], columns - a.shape[-1], a.dtype
    if dtype.itemsize == 1 and dtype not in (jnp.uint8, jnp.int8):
        a = lax.bitcast_convert_type(a, jnp.uint8)
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, rows), (0, columns)])
    return a if a.dtype == dtype else lax.bitcast_convert_type(a, dtype)


def _columns(a: jax.Array, layout: WeightLayout) -> jax.Array:
    """A number for each column and the padding: `[..., G, 1 or N or blocks] -> [..., G, N']`."""
    if layout.block_size is not None:
        wide = jnp.broadcast_to(a[..., None], (*a.shape, layout.block_size[1]))
        a = wide.reshape(*a.shape[:-1], -1)[..., : layout.n]
    elif a.shape[-1] == 1:
        a = jnp.broadcast_to(a, (*a.shape[:-1], layout.n))
    return _pad(a, a.shape[-2], layout.padded_n)
