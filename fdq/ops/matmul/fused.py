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
from fdq.ops.dots import exact_dot, sum_in_chains
from fdq.ops.weight_view import WeightView, has_table, pad_rows

Unit = list[jax.Array]


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

    def total(row: tuple[jax.Array, Any]) -> jax.Array:
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
            return total + sum_in_chains(products)
        # What takes more to decode leaves no registers for several sums.
        return functools.reduce(jnp.add, products, total)

    return _summed(total, rows, view, dot=dot)


def looked_up_product(x: jax.Array, view: WeightView, block_units: int) -> jax.Array:
    """float32 `[M, K]` -> `[M, N]`, a lookup a byte: what all 256 bytes contribute is a table.

    The tables `[units, 256]` are those of a row of x: of each packed byte, the sum of its rows'
    values by those of x. For codebooks, whose values are not computed by shifts and masks.
    """
    assert has_table(view)
    x = pad_rows(x, view)
    groups, blocks, block = _blocks(view, block_units)
    n = view.columns
    with jax.ensure_compile_time_eval():
        values = view.decode_unit([jnp.arange(256, dtype=jnp.uint8).reshape(1, 256)], ())
    values = [np.asarray(value) for value in values]
    parts = x.reshape(x.shape[0], view.units, view.unit_rows, 1)
    zero = None if view.zero is None else view.zero[:, None, :]
    rows = lax.optimization_barrier((parts, None if zero is None else _block_sums(x, view)))
    codes = view.codes.reshape(groups * blocks, block, n)

    def total(row: tuple[jax.Array, Any]) -> jax.Array:
        parts, sums = row
        table = functools.reduce(jnp.add, [parts[:, p] * v for p, v in enumerate(values)])
        # Codes of its own: what two rows share of a lookup, XLA writes to memory.
        own = (table.reshape(groups * blocks, block, 256), codes)
        table, indices = lax.optimization_barrier(own)
        total = jnp.zeros((groups * blocks, n), jnp.float32)
        for j in range(block):
            index = indices[:, j, :, None].astype(jnp.int32)
            total = total + lax.gather(
                table[:, j], index, _OF_OWN_ROW, (1, 1), mode="promise_in_bounds"
            )
        total = total.reshape(groups, blocks, n)
        if zero is not None and sums is not None:
            in_blocks = jnp.sum(sums.reshape(groups, blocks, block, 1), axis=2)
            total = total - zero * in_blocks
        return total

    return _summed(total, rows, view, dot=True)


def _summed(
    total: Callable[[Any], jax.Array], rows: Any, view: WeightView, *, dot: bool
) -> jax.Array:
    """The sums over blocks of what a row gives, `[groups, blocks, N]`, with the scales.

    `rows` are arrays with a first axis of M, of which `total` takes one row.
    """
    scale = (view.scale * view.format.unit_factor)[:, None, :]
    per_channel = scale.shape[0] == 1

    def finished(row: Any) -> jax.Array:
        partial = total(row) if per_channel else total(row) * scale
        partial = partial.reshape(-1, view.columns)
        if dot:
            y = exact_dot(jnp.ones((1, partial.shape[0]), jnp.float32), partial)
        else:
            y = jnp.sum(partial, axis=0, keepdims=True)
        return y * scale[0] if per_channel else y

    found: list[jax.Array] = []
    for i in range(jax.tree.leaves(rows)[0].shape[0]):
        row = jax.tree.map(lambda a: a[i], rows)  # noqa: B023
        if dot and found:
            # On CPUs one after the other: each has all cores, and the memory of the one before.
            row, found[-1] = lax.optimization_barrier((row, found[-1]))
        found.append(finished(row))
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
# 16 MB of partial sums: the memory of more than 32 is mapped anew at every call.
_MOST_SUMS = 2**22
# A way of a CPU's first cache, and how many rows of a block may share their lines of it: all have
# 64 sets of 64 bytes, and 8 ways or more.
_CACHE_WAY = 4096
_CACHE_WAYS = 8


def _blocks(view: WeightView, block_units: int) -> tuple[int, int, int]:
    """Groups, blocks in a group and units in a block."""
    groups = view.scale.shape[-2]
    per_group = view.units // groups
    stride = view.columns * view.codes.dtype.itemsize
    rows = max(1, _CACHE_WAYS * _CACHE_WAY // math.gcd(stride, _CACHE_WAY) // view.unit_bytes)
    block_units = max(min(block_units, rows), -(-view.units * view.columns // _MOST_SUMS))
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
