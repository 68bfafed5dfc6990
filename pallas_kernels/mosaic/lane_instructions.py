"""Instructions that `jax.numpy` has no name for, applied to each element of an array of columns.

For kernels on a GPU only: the interpreter has no machine instructions, so that every caller has
another form for it, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as mg
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.mosaic import mma_instructions as ptx
from pallas_kernels.mosaic.launch import THREADS


def column_layout(columns: int) -> Any:
    """How an array `[columns]` of 32-bit elements, a multiple of 128, lies in a warp group.

    Four neighbours a thread (one 128-bit load) where there are enough of them.
    """
    if columns % THREADS:
        raise ValueError(
            f"columns={columns} is not a multiple of {THREADS}, the threads of a warp group."
        )
    vector_size = next(size for size in (4, 2, 1) if columns % (size * THREADS) == 0)
    return mg.Layout.WG_STRIDED((columns,), vec_size=vector_size)


def apply(
    emit: Callable[..., Sequence[Any]],
    arrays: Sequence[jax.Array],
    dtypes: Sequence[Any],
    layout: Any = None,
) -> list[jax.Array]:
    """`emit` of the elements of 32-bit arrays, one thread's element at a time.

    It takes MLIR values, one for each array (all of one shape), and makes one for each of the
    results' dtypes, 32 bits wide. `layout` is that of arrays and results; None: `column_layout`.
    """
    shape = arrays[0].shape
    kind = column_layout(*shape) if layout is None else layout

    @mg.inline_mgpu(
        arg_types=tuple(kind for _ in arrays),
        return_type=tuple(mg.ShapeDtypeStruct(shape, dtype, kind) for dtype in dtypes),
    )
    def run(_context, *operands):
        registers = operands[0].registers.shape
        results = [np.empty(registers, dtype=object) for _ in dtypes]
        for index in np.ndindex(registers):
            lanes = [ptx.lanes(operand.registers[index]) for operand in operands]
            elements = [emit(*values) for values in zip(*lanes, strict=True)]
            for result, parts in zip(results, zip(*elements, strict=True), strict=True):
                result[index] = ptx.vector(parts)
        return tuple(
            mgpu.FragmentedArray(
                _registers=result,
                _layout=operands[0].layout,
                _is_signed=False if np.issubdtype(dtype, np.integer) else None,
            )
            for result, dtype in zip(results, dtypes, strict=True)
        )

    results: Any = run(*arrays)
    return list(results)


def assembly_bits(text: str, *operands: Any) -> Any:
    """The int32 result of PTX without side effects; operands are float32 or int32 values."""
    f32 = ir.F32Type.get()
    constraints = ["=r"] + ["f" if operand.type == f32 else "r" for operand in operands]
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(operands), text, ",".join(constraints), has_side_effects=False)


def number(value: float) -> Any:
    """A float32 constant."""
    f32 = ir.F32Type.get()
    return arith.constant(f32, ir.FloatAttr.get(f32, value))


def integer(value: int) -> Any:
    """An int32 constant."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


class Word:
    """An int32 value with the operators of a signed integer of which the other one is static."""

    def __init__(self, value: Any):
        self.value = value

    def __lshift__(self, bits: int) -> Word:
        return Word(arith.shli(self.value, integer(bits)))

    def __rshift__(self, bits: int) -> Word:
        return Word(arith.shrsi(self.value, integer(bits)))

    def __and__(self, mask: int) -> Word:
        return Word(arith.andi(self.value, integer(mask)))


def as_float(word: Word) -> Any:
    """The float32 value with the bits of a word."""
    return arith.bitcast(ir.F32Type.get(), word.value)


def shift_right(word: Any, bits: int) -> Any:
    """Logical shift of an int32 value."""
    return arith.shrui(word, integer(bits)) if bits else word


def read_byte(word: Any, byte: int) -> Any:
    """Byte 0 .. 3 of an int32 value, read as a float32: 2^-149 of it."""
    bits = shift_right(word, 8 * byte)
    if byte < 3:
        bits = arith.andi(bits, integer(0xFF))
    return arith.bitcast(ir.F32Type.get(), bits)


def lane_table(values: Sequence[float]) -> Any:
    """A float32 in each lane of a warp: `values[lane % len(values)]`, a power of two of them.

    Does not change from loop to loop, so the compiler keeps it in one register.
    """
    return _by_lane([number(value) for value in values])


def lane_words(values: Sequence[int]) -> Any:
    """Likewise an int32 in each lane."""
    return _by_lane([integer(value) for value in values])


def _by_lane(table: list[Any]) -> Any:
    lane = mgpu.thread_idx()
    bit = 1
    while len(table) > 1:
        is_set = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, integer(bit)), integer(0))
        table = [arith.select(is_set, b, a) for a, b in zip(table[::2], table[1::2], strict=True)]
        bit *= 2
    return table[0]


def read_lane(table: Any, lane: Any) -> Any:
    """The float32 or int32 that lane `lane % 32` of the warp holds in `table`: one shuffle."""
    return nvvm.shfl_sync(integer(-1), table, lane, integer(0x1F), nvvm.ShflKind.idx)
