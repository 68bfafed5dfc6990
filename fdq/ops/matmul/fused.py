"""One row times a quantized weight as one element-wise fusion, which XLA spreads over all cores.

Nothing decoded is written, only a partial sum a block of packed units. On CPUs the fastest for one
row, by far; several rows are a fusion each, as XLA has none with several results.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdq.formats.format import Format
from fdq.formats.grouping import SMALLEST_NORMAL
from fdq.ops.dots import exact_dot, sum_in_chains
from fdq.ops.weight_view import WeightView, add_offsets, has_table, pad_rows

Unit = list[jax.Array]
Sizes = tuple[int, int, int]


def fused_product(x: jax.Array, view: WeightView, block_units: int, *, dot: bool) -> jax.Array:
    """float32 `[M, K]` -> `[M, N]`: one element-wise fusion a row over `[blocks, N]`, then a sum.

    A block has `block_units` packed units, or the most below that divide a group and whose rows do
    not push each other out of the cache (rows of 4096 bytes lie in the same lines of it). Blocks
    are summed by a `dot` with ones on CPUs, where XLA's reduction takes 4 to 17 times longer.
    """
    x = pad_rows(x, view)
    chained = dot and _is_packed_integer(view)
    weights = _chain(x, view) if chained else x
    sums = _block_sums(x, view) if chained else None
    # Without the barrier XLA fuses what made x (a quantization, a norm) into every product with it.
    rows = lax.optimization_barrier((weights, sums))
    groups, blocks, block = _blocks(view, block_units)
    n = view.columns
    codes = view.codes.reshape(groups, blocks, block, view.unit_bytes, n)
    tables = tuple(a[:, None, :] for a in view.tables)
    zero = None if view.zero is None else view.zero[:, None, :]

    def total(row: tuple[jax.Array, Any]) -> list[jax.Array]:
        """`[groups, blocks, n]`, before the scale."""
        weights, sums = row
        parts = weights.reshape(groups, blocks, block, view.unit_rows, 1)
        total = jnp.zeros((groups, blocks, n), jnp.float32)
        if sums is not None:
            offset = view.format.integer_offset(view.spec) or 0.0
            shift = jnp.float32(offset) if zero is None else zero + jnp.float32(offset)
            in_blocks = jnp.sum(sums.reshape(groups, blocks, block, 1), axis=2)
            total = total - shift * in_blocks
        products = []
        for j in range(block):
            unit = [codes[:, :, j, i] for i in range(view.unit_bytes)]
            if chained:
                values = _masked_words(unit, view.format.bits, view.unit_rows)
            else:
                values = view.decode_unit(unit, tables)
                values = values if zero is None else [v - zero for v in values]
            products += [parts[:, :, j, p] * value for p, value in enumerate(values)]
        if chained:
            return [total + sum_in_chains(products)]
        # What takes more to decode leaves no registers for several sums.
        return [functools.reduce(jnp.add, products, total)]

    return add_offsets(_summed(total, rows, view, dot=dot), x, view)


def looked_up_product(x: jax.Array, view: WeightView, block_units: int) -> jax.Array:
    """float32 `[M, K]` -> `[M, N]`, a lookup a byte: what all 256 bytes contribute is a table.

    The tables `[units, 256]` are those of a row of x: of each packed byte, the sum of its rows'
    values by those of x. For codebooks, whose values are not computed by shifts and masks. Two rows
    of x share their lookups: one table of 64-bit integers, of which each has a half.
    """
    assert has_table(view)
    x = pad_rows(x, view)
    sizes = _blocks(view, block_units, together=2 if x.shape[0] > 1 else 1)
    with jax.ensure_compile_time_eval():
        decoded = view.decode_unit([jnp.arange(256, dtype=jnp.uint8).reshape(1, 256)], ())
    values = [np.asarray(value) for value in decoded]
    parts = x.reshape(x.shape[0], view.units, view.unit_rows, 1)
    zero = None if view.zero is None else view.zero[:, None, :]
    rows = lax.optimization_barrier((parts, None if zero is None else _block_sums(x, view)))

    def total(some: tuple[jax.Array, Any]) -> list[jax.Array]:
        parts, sums = some
        look_up = _looked_up if len(parts) == 1 else _two_looked_up
        totals = [total.reshape(*sizes[:2], -1) for total in look_up(parts, values, view, sizes)]
        if zero is None or sums is None:
            return totals
        in_blocks = jnp.sum(sums.reshape(-1, *sizes, 1), axis=3)
        return [total - zero * of_row for total, of_row in zip(totals, in_blocks, strict=True)]

    return add_offsets(_summed(total, rows, view, dot=True, together=2), x, view)


def _looked_up(
    parts: jax.Array, values: list[np.ndarray], view: WeightView, sizes: Sizes
) -> list[jax.Array]:
    """One row, `[1, units, unit_rows, 1]` -> its sums over each block, `[blocks, N]`."""
    table = functools.reduce(jnp.add, [parts[0, :, p] * v for p, v in enumerate(values)])
    return [_sums_of_entries(table, view, sizes)]


def _two_looked_up(
    parts: jax.Array, values: list[np.ndarray], view: WeightView, sizes: Sizes
) -> list[jax.Array]:
    """Two rows, `[2, units, unit_rows, 1]`, as integers: 25 bits of the largest in their block.

    A step so small that it is no normal number counts as 1: what it stood for is less than 2^-96. A
    block with an infinity is NaN.
    """
    groups, blocks, block = sizes
    in_blocks = parts.reshape(2, groups * blocks, -1)
    # Half of what 32 bits hold, for the entries are rounded.
    reach = block * sum(float(np.abs(v).max()) for v in values)
    step = jnp.max(jnp.abs(in_blocks), axis=-1, keepdims=True) * np.float32(reach / 2**30)
    step = jnp.where(step < SMALLEST_NORMAL, jnp.float32(1), step)
    scaled = lax.optimization_barrier((in_blocks / step).reshape(parts.shape))
    entries = functools.reduce(jnp.add, [scaled[:, :, p] * v[None] for p, v in enumerate(values)])
    low, high = jnp.round(entries).astype(jnp.int32)
    with jax.enable_x64(True):
        shift = lax.full(high.shape, 32, np.int64)
        table = lax.shift_left(_widened(high), shift) + _widened(low)
        both = lax.optimization_barrier(_sums_of_entries(table, view, sizes))
        low = lax.convert_element_type(both, np.int32)
        high = lax.shift_right_arithmetic(both - _widened(low), lax.full(both.shape, 32, np.int64))
        high = lax.convert_element_type(high, np.int32)
    return [
        total.astype(jnp.float32) * of_row for total, of_row in zip((low, high), step, strict=True)
    ]


def _widened(a: jax.Array) -> jax.Array:
    return lax.convert_element_type(a, np.int64)


def _sums_of_entries(table: jax.Array, view: WeightView, sizes: Sizes) -> jax.Array:
    """A table `[units, 256]` -> sums over each block of what its bytes select, `[blocks, N]`."""
    groups, blocks, block = sizes
    codes = view.codes.reshape(groups * blocks, block, view.columns)
    # Codes of its own: what two rows share of a lookup, XLA writes to memory.
    own = (table.reshape(groups * blocks, block, 256), codes)
    table, indices = lax.optimization_barrier(own)
    entries = [
        lax.gather(
            table[:, j],
            lax.convert_element_type(indices[:, j, :, None], np.int32),
            _OF_OWN_ROW,
            (1, 1),
            mode="promise_in_bounds",
        )
        for j in range(block)
    ]
    return functools.reduce(lax.add, entries)


def _summed(
    total: Callable[[Any], list[jax.Array]],
    rows: Any,
    view: WeightView,
    *,
    dot: bool,
    together: int = 1,
) -> jax.Array:
    """The sums over blocks of what rows give, `[groups, blocks, N]` each, with the scales.

    `rows` are arrays with a first axis of M, of which `total` takes `together` at once.
    """
    scale = (view.scale * view.format.unit_factor)[:, None, :]
    per_channel = scale.shape[0] == 1

    def finished(partial: jax.Array) -> jax.Array:
        partial = partial if per_channel else partial * scale
        partial = partial.reshape(-1, view.columns)
        if dot:
            y = exact_dot(jnp.ones((1, partial.shape[0]), jnp.float32), partial)
        else:
            y = jnp.sum(partial, axis=0, keepdims=True)
        return y * scale[0] if per_channel else y

    found: list[jax.Array] = []
    for i in range(0, jax.tree.leaves(rows)[0].shape[0], together):
        some = jax.tree.map(lambda a: a[i : i + together], rows)  # noqa: B023
        if dot and found:
            # On CPUs one after the other: each has all cores, and the memory of the one before.
            some, found[-1] = lax.optimization_barrier((some, found[-1]))
        found += map(finished, total(some))
    return jnp.concatenate(found, axis=0)


# `table[b, index[b, n]]`. `jnp.take_along_axis` also maps negative indices, which takes time where
# XLA does not see that there are none.
_OF_OWN_ROW = lax.GatherDimensionNumbers(
    offset_dims=(),
    collapsed_slice_dims=(1,),
    start_index_map=(1,),
    operand_batching_dims=(0,),
    start_indices_batching_dims=(0,),
)
# 16 MB of partial sums of a row: the memory of more than 32 is mapped anew at every call.
_MOST_SUMS = 2**22
# A way of a CPU's first cache, and how many rows of a block may share their lines of it: all have
# 64 sets of 64 bytes, and 8 ways or more.
_CACHE_WAY = 4096
_CACHE_WAYS = 8


def _blocks(view: WeightView, block_units: int, *, together: int = 1) -> Sizes:
    """Groups, blocks in a group and units in a block; so many rows of x are summed `together`."""
    groups = view.scale.shape[-2]
    per_group = view.units // groups
    stride = view.columns * view.codes.dtype.itemsize
    rows = max(1, _CACHE_WAYS * _CACHE_WAY // math.gcd(stride, _CACHE_WAY) // view.unit_bytes)
    block_units = max(
        min(block_units, rows), -(-together * view.units * view.columns // _MOST_SUMS)
    )
    block = next(b for b in range(min(block_units, per_group), 0, -1) if per_group % b == 0)
    return groups, per_group // block, block


def _is_packed_integer(view: WeightView) -> bool:
    return (
        isinstance(view.format, Format)
        and view.spec is not None
        and view.format.bits < 8
        and view.format.integer_offset(view.spec) is not None
    )


def _chain(x: jax.Array, view: WeightView) -> jax.Array:
    """`[M, K]` -> the same shape: factors of the words of `_masked_words` in place of the codes.

    With `w_p` the lowest p + 1 codes of a unit as one number, code p is
    `(w_p - w_(p-1)) / 2^(bits p)`: a shift less for each, and exact, as these are powers of two.
    """
    parts = x.reshape(x.shape[0], view.units, view.unit_rows)
    shifts = jnp.arange(view.unit_rows, dtype=jnp.int32).reshape(1, 1, -1)
    scaled = jnp.ldexp(parts, -view.format.bits * shifts)
    return (scaled - jnp.pad(scaled[..., 1:], [(0, 0), (0, 0), (0, 1)])).reshape(x.shape)


def _masked_words(unit: Unit, bits: int, rows: int) -> Unit:
    """The bytes of a unit -> its lowest 1, 2, ... codes as one number each, float32."""
    word = unit[0].astype(jnp.int32)
    for i, byte in enumerate(unit[1:], 1):
        word = word | (byte.astype(jnp.int32) << jnp.int32(8 * i))
    masked = [word & jnp.int32(2 ** (bits * (p + 1)) - 1) for p in range(rows - 1)]
    return [w.astype(jnp.float32) for w in (*masked, word)]


def _block_sums(x: jax.Array, view: WeightView) -> jax.Array:
    """Sums of x over the rows of each unit, `[M, units]`."""
    return jnp.sum(x.reshape(x.shape[0], view.units, view.unit_rows), axis=-1)
