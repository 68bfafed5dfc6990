"""Runs what `mma_fragments`, `mma_products` and their instructions emit for a GPU, in NumPy.

The functions under test build their code through a handful of MLIR constructors and inline PTX.
Here these names stand for the same operations on arrays of one number a thread, written from the
PTX manual (fragments of mma.m16n8k16 and movmatrix, byte numbers of prmt), and arrays are dealt out
to threads by the definition of Mosaic's tiled layouts. So the choice of channels, slots and bytes
is checked without a GPU; that ptxas accepts the code is checked by compiling it.
"""

import contextlib
import dataclasses
import re
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from ptx_machine import add_downwards

from pallas_kernels.matmul import mma_integers, mma_products
from pallas_kernels.mosaic import (
    lane_instructions,
    mma_fragments,
    mma_instructions,
)

THREADS = 128
_NUMPY = {"i32": np.uint32, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_KINDS = {"int32": "i32", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclasses.dataclass
class Value:
    """A register of every thread: `data [128]`, or `[n, 128]` of a vector `(n, kind)`."""

    type: object
    data: np.ndarray


@dataclasses.dataclass
class Fragments:
    """What a FragmentedArray is to the code under test."""

    registers: np.ndarray
    layout: object = None
    is_signed: bool | None = None


def _tile(array: np.ndarray, tiles) -> np.ndarray:
    for tile in tiles:
        rank = len(tile)
        kept = array.shape[: array.ndim - rank]
        tiled = array.shape[array.ndim - rank :]
        split = [n for size, t in zip(tiled, tile, strict=True) for n in (size // t, t)]
        first = len(kept)
        order = [*range(first), *range(first, first + 2 * rank, 2)]
        order += range(first + 1, first + 2 * rank, 2)
        array = array.reshape(*kept, *split).transpose(order)
    return array


def _elements(layout, shape) -> np.ndarray:
    """`[*registers, vector, 128]`: which element of an array each thread holds."""
    tiled = _tile(np.arange(np.prod(shape)).reshape(shape), layout.tiling.tiles)
    registers = layout.registers_shape(shape)
    out = np.empty((*registers, layout.vector_length, THREADS), int)

    def split(index, dims):
        sizes = [tiled.shape[d] if isinstance(d, int) else d.times for d in dims]
        return zip(dims, np.unravel_index(index, sizes), strict=True)

    for thread in range(THREADS):
        where = [*split(thread // 32, layout.warp_dims), *split(thread % 32, layout.lane_dims)]
        mine = tiled
        for dim, i in where:
            if isinstance(dim, int):
                mine = np.take(mine, [i], axis=tiled.ndim + dim)
        vector = np.moveaxis(mine, layout.vector_dim, -1)
        out[..., thread] = np.expand_dims(vector, layout.vector_dim - 1)[...].reshape(
            *registers, layout.vector_length
        )
    return out


def _deal(array, layout) -> Fragments:
    elements = _elements(layout, array.shape)
    kind = _KINDS[array.dtype.name]
    flat = np.asarray(array).reshape(-1)
    flat = flat.view(np.uint32) if kind == "i32" else flat
    registers = np.empty(elements.shape[:-2], dtype=object)
    for index in np.ndindex(registers.shape):
        registers[index] = Value((elements.shape[-2], kind), flat[elements[index]])
    return Fragments(registers)


def _collect(fragments: Fragments, layout, shape, dtype):
    elements = _elements(layout, shape)
    out = np.full(np.prod(shape), np.nan)  # holds int32 and float32 exactly
    registers = fragments.registers.reshape(elements.shape[:-2])
    for index in np.ndindex(registers.shape):
        data = registers[index].data
        out[elements[index]] = data.view(np.int32) if dtype == np.int32 else data
    # Threads that hold copies must agree.
    for index in np.ndindex(registers.shape):
        data = registers[index].data
        data = data.view(np.int32) if dtype == np.int32 else data
        np.testing.assert_array_equal(out[elements[index]], data)
    return jnp.asarray(out.reshape(shape), dtype)


def _inline_mgpu(arg_types, return_type):
    def decorate(function):
        def run(*arrays):
            given = [_deal(a, t.to_mgpu()) for a, t in zip(arrays, arg_types, strict=True)]
            layout = return_type.layout.to_mgpu()
            found = function(None, *given)
            return _collect(found, layout, return_type.shape, return_type.dtype)

        return run

    return decorate


def _bytes_of(value: Value) -> np.ndarray:
    data = value.data if value.data.ndim == 2 else value.data[None]
    return np.concatenate([np.ascontiguousarray(d)[:, None].view(np.uint8) for d in data], axis=1)


def _from_bytes(kind, raw: np.ndarray) -> Value:
    element = kind if isinstance(kind, str) else kind[1]
    data = np.ascontiguousarray(raw).view(_NUMPY[element]).T
    return Value(kind, data[0] if isinstance(kind, str) else data)


def _halves(value: Value, kind: str) -> np.ndarray:
    """`[2, 128]` 16-bit floats of an i32, as float32."""
    return _from_bytes((2, kind), _bytes_of(value)).data.astype(np.float32)


LANE = np.arange(THREADS) % 32
WARP = np.arange(THREADS) // 32
ROW, COLUMN = LANE // 4, LANE % 4


def _mma(kind, operands) -> list[Value]:
    a, b = np.zeros((4, 16, 16), np.float32), np.zeros((4, 16, 8), np.float32)
    c = np.zeros((4, 16, 8), np.float32)
    for i in range(8):
        row = ROW + 8 * (i // 2 % 2)
        a[WARP, row, 2 * COLUMN + i % 2 + 8 * (i // 4)] = _halves(operands[i // 2], kind)[i % 2]
    for i in range(4):
        row = 2 * COLUMN + i % 2 + 8 * (i // 2)
        b[WARP, row, ROW] = _halves(operands[4 + i // 2], kind)[i % 2]
        c[WARP, ROW + 8 * (i // 2), 2 * COLUMN + i % 2] = operands[6 + i].data
    d = a @ b + c
    return [Value("f32", d[WARP, ROW + 8 * (i // 2), 2 * COLUMN + i % 2]) for i in range(4)]


def _mma_integers(operands) -> list[Value]:
    """m16n8k32 of signed bytes, or m16n8k16: half of its columns of K."""
    half = len(operands) == 7
    a, b = np.zeros((4, 16, 32), np.int64), np.zeros((4, 32, 8), np.int64)
    c = np.zeros((4, 16, 8), np.int64)
    left, right, sums = (2, 1, 4) if half else (4, 2, 4)
    assert len(operands) == left + right + sums
    for i in range(4 * left):
        row, k = ROW + 8 * (i // 4 % 2), 4 * COLUMN + i % 4 + 16 * (i // 8)
        a[WARP, row, k] = _bytes_of(operands[i // 4])[:, i % 4].view(np.int8)
    for i in range(4 * right):
        k = 4 * COLUMN + i % 4 + 16 * (i // 4)
        b[WARP, k, ROW] = _bytes_of(operands[left + i // 4])[:, i % 4].view(np.int8)
    for i in range(4):
        own = operands[left + right + i].data.view(np.int32)
        c[WARP, ROW + 8 * (i // 2), 2 * COLUMN + i % 2] = own
    d = a @ b + c
    assert np.abs(d).max() < 2**31
    found = [d[WARP, ROW + 8 * (i // 2), 2 * COLUMN + i % 2] for i in range(4)]
    return [Value("i32", x.astype(np.int32).view(np.uint32)) for x in found]


def _inline_asm(kind, operands, text, constraints, **_):
    assert len(constraints.split(",")) == len(re.findall(r"\$\d+", text))
    name = text.split()[0]
    if text.startswith("{ .reg .f32 a; mul.rn.f32 a, $1, $2; add.rn.f32 a, a, $3; add.rm.f32 a"):
        x, y, z, last = (o.data for o in operands)
        return Value(kind, add_downwards(x * y + z, last).view(np.uint32))
    if name.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
        assert name.split(".")[7] == name.split(".")[8]
        return _mma(name.split(".")[7], operands)
    if name.startswith("mma.sync.aligned.m16n8k"):
        size = {"m16n8k32": 10, "m16n8k16": 7}[name.split(".")[3]]
        assert name.endswith(".row.col.s32.s8.s8.s32") and len(operands) == size
        groups = [group.count("$") for group in re.findall(r"{(.*?)}", text)]
        assert groups == ([4, 4, 2, 4] if size == 10 else [4, 2, 1, 4])
        return _mma_integers(operands)
    if name == "movmatrix.sync.aligned.m8n8.trans.b16":
        matrix = np.zeros((4, 8, 8), np.uint16)
        halves = _bytes_of(operands[0]).view(np.uint16)
        for i in range(2):
            matrix[WARP, ROW, 2 * COLUMN + i] = halves[:, i]
        turned = np.stack([matrix[WARP, 2 * COLUMN + i, ROW] for i in range(2)], axis=1)
        return _from_bytes(kind, turned.view(np.uint8))
    if name == "prmt.b32":
        pool = np.concatenate([_bytes_of(operands[0]), _bytes_of(operands[1])], axis=1)
        selector = int(operands[2].data[0])
        picks = [selector >> 4 * i & 15 for i in range(4)]
        assert max(picks) < 8
        return _from_bytes(kind, pool[:, picks])
    if name == "shfl.sync.bfly.b32":
        distance = int(text.split(",")[2])
        return Value(kind, operands[0].data[32 * WARP + (LANE ^ distance)])
    if name == "max.f32":
        return Value(kind, np.maximum(operands[0].data, operands[1].data))
    if name == "fma.rn.f32":
        x, y, z = (o.data.astype(np.float64) for o in operands)
        return Value(kind, (x * y + z).astype(np.float32))
    assert name in ("fma.rn.f16x2", "fma.rn.bf16x2"), text
    # Exact in float64, so rounded once.
    of = name.split(".")[2].removesuffix("x2")
    x, y, z = (_halves(o, of).astype(np.float64) for o in operands)
    rounded = (x * y + z).astype(_NUMPY[of])
    return _from_bytes(kind, np.ascontiguousarray(rounded.T).view(np.uint8))


def _elementwise(operation, kind=None):
    return lambda x, y: Value(kind or x.type, operation(x.data, y.data))


class _VectorType:
    def __init__(self, kind):
        self.shape = [kind[0]]

    @staticmethod
    def get(shape, kind):
        return (shape[0], kind)


def _constant(kind, value):
    dtype = _NUMPY[kind]
    value = value & 0xFFFFFFFF if kind == "i32" else value
    return Value(kind, np.full(THREADS, value, dtype))


_TYPES = {
    f"{k.upper()}Type": types.SimpleNamespace(get=lambda k=k: k) for k in ("f32", "f16", "bf16")
}
_IR = types.SimpleNamespace(
    IntegerType=types.SimpleNamespace(get_signless=lambda bits: f"i{bits}"),
    FloatAttr=types.SimpleNamespace(get=lambda _, value: value),
    IntegerAttr=types.SimpleNamespace(get=lambda _, value: value),
    DenseI64ArrayAttr=types.SimpleNamespace(get=lambda position: position),
    VectorType=_VectorType,
    **_TYPES,
)
_ARITH = types.SimpleNamespace(
    constant=_constant,
    xori=_elementwise(np.bitwise_xor),
    andi=_elementwise(np.bitwise_and),
    ori=_elementwise(np.bitwise_or),
    shrui=_elementwise(np.right_shift),
    mulf=_elementwise(np.multiply),
    addf=_elementwise(np.add),
    subf=_elementwise(np.subtract),
    shli=_elementwise(np.left_shift),
    bitcast=lambda kind, x: Value(kind, x.data.view(_NUMPY[kind])),
    cmpi=lambda predicate, x, y: Value("i1", predicate(x.data, y.data)),
    select=lambda which, x, y: Value(x.type, np.where(which.data, x.data, y.data)),
    CmpIPredicate=types.SimpleNamespace(ne=np.not_equal),
    sitofp=lambda kind, x: Value(kind, x.data.view(np.int32).astype(_NUMPY[kind])),
    truncf=lambda kind, x: Value(kind, x.data.astype(_NUMPY[kind])),
)
_NVVM = types.SimpleNamespace(
    shfl_sync=lambda mask, table, lane, clamp, kind: Value(
        table.type, table.data[32 * WARP + lane.data % 32]
    ),
    ShflKind=types.SimpleNamespace(idx=None),
)
_LLVM = types.SimpleNamespace(
    inline_asm=_inline_asm,
    bitcast=lambda kind, x: _from_bytes(kind, _bytes_of(x)),
    extractvalue=lambda _, struct, position: struct[position[0]],
    StructType=types.SimpleNamespace(get_literal=lambda kinds: kinds),
)
_VECTOR = types.SimpleNamespace(
    extract=lambda x, dynamic_position, static_position: Value(
        x.type[1], x.data[static_position[0]]
    ),
    from_elements=lambda kind, parts: Value(kind, np.stack([p.data for p in parts])),
)


@contextlib.contextmanager
def emulated_gpu(monkeypatch):
    """Inside, tiles of `mma_fragments`, `mma_products` and `mma_integers` take their path for GPUs,
    on arrays.
    """
    real = mma_fragments.mg
    names = {n: getattr(real, n) for n in ("Layout", "Tiling", "Replicated", "ShapeDtypeStruct")}
    mosaic = types.SimpleNamespace(inline_mgpu=_inline_mgpu, **names)
    arrays = types.SimpleNamespace(
        thread_idx=lambda: Value("i32", np.arange(THREADS, dtype="u4")),
        FragmentedArray=lambda _registers, _layout, _is_signed: Fragments(_registers, _layout),
    )
    with monkeypatch.context() as patch:
        for name, value in {"ir": _IR, "arith": _ARITH, "llvm": _LLVM, "nvvm": _NVVM}.items():
            patch.setattr(lane_instructions, name, value)
        patch.setattr(lane_instructions, "mgpu", arrays)
        for name, value in {
            "mg": mosaic,
            "mgpu": arrays,
            "arith": _ARITH,
            "runs_interpreted": lambda: False,
        }.items():
            patch.setattr(mma_fragments, name, value)
            if name != "arith":
                patch.setattr(mma_products, name, value)
        patch.setattr(mma_integers, "runs_interpreted", lambda: False)
        for name, value in {
            "ir": _IR,
            "arith": _ARITH,
            "llvm": _LLVM,
            "vectors": _VECTOR,
        }.items():
            patch.setattr(mma_instructions, name, value)
        yield
