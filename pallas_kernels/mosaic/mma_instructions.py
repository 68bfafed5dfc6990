"""Instructions of one thread that tensor-core tiles are made of: MLIR values in, MLIR values out.

A word is an i32; four codes of a byte, eight of a nibble or two 16-bit floats.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import vector as vectors


def nibbles(word, j: int, offset):
    """Two float16: nibbles j and j + 4 (j of each half), times 2^-9, plus `offset`.

    A nibble in a float16's lowest bits is a subnormal, which a multiply-add takes as it is.
    """
    if j >= 2:
        word = arith.shrui(word, constant(8))
    mask, factor = ((0x000F000F, 0x78007800), (0x00F000F0, 0x68006800))[j % 2]  # 2^15, 2^11
    word = arith.andi(word, constant(mask))
    return _asm("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", word, constant(factor), offset)


def flip_signs(word):
    """The highest bit of each byte: of signed bytes, 128 is added."""
    return arith.xori(word, constant(0x80808080))


def biased_bytes(word, selector: int):
    """Two float16 of two bytes that are 128 too large."""
    return _subtract(permute(word, constant(0x64646464), selector), constant(0x64806480))


def e4m3(word, selector: int):
    """Two float16 of two bytes, their values times 2^-8: exponent and mantissa moved."""
    word = permute(word, constant(0), selector)
    small = arith.andi(arith.shrui(word, constant(1)), constant(0x3F803F80))
    return arith.ori(arith.andi(word, constant(0x80008000)), small)


def int4_offset(low, high):
    """Two float16, minus 2^-9 times the zero points of two vectors of one float32."""
    f32, f16 = ir.F32Type.get(), ir.F16Type.get()
    factor = arith.constant(f32, -(2.0**-9))
    parts = [arith.truncf(f16, arith.mulf(lane(reg, 0), factor)) for reg in (low, high)]
    return as_word(vector(parts))


def _subtract(x, y):
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    return as_word(arith.subf(_bitcast(x, pair), _bitcast(y, pair)))


def field_exponent(dtype: Any) -> int:
    """Of `fields`: they are numbers times two to it."""
    return -6 if dtype == jnp.bfloat16 else -9


def fields(word, positions, bits: int, offset, dtype: Any):
    """Registers of two floats: of each half, the unsigned fields at `positions`, plus `offset`.

    Offset (a register of two floats) and results are numbers times `2**field_exponent`, and exact:
    a field of 8 bits at most in a 16-bit float's lowest bits is a subnormal (in bfloat16 up to the
    first binade, whose step is the same), which a multiply-add takes as it is.
    """
    window = 8 if dtype == jnp.bfloat16 else 11
    moved, shift, out = word, 0, []
    for position in positions:
        if position - shift + bits > window:
            shift = position
            moved = arith.shrui(word, constant(shift))
        place = position - shift
        mask = ((1 << bits) - 1) << place
        found = arith.andi(moved, constant(mask << 16 | mask))
        power = 127 - place if dtype == jnp.bfloat16 else 15 - place
        out.append(multiply_add(found, power_pair(power, dtype), offset, dtype))
    return out


def moved(word, moves):
    """Bits of a word put together: for each `(left, mask)` those shifted left (right where it is
    negative) and masked, the same mask for both halves.
    """
    out = None
    for left, mask in moves:
        part = word
        if left > 0:
            part = arith.shli(word, constant(left))
        elif left < 0:
            part = arith.shrui(word, constant(-left))
        part = arith.andi(part, constant(mask << 16 | mask))
        out = part if out is None else arith.ori(out, part)
    return out


def between(low, high, bits: int):
    """The word that begins at bit `bits` of `low` and ends in `high`."""
    return arith.ori(arith.shrui(low, constant(bits)), arith.shli(high, constant(32 - bits)))


def shifted(word, left: int):
    """A word moved to the left, or to the right where `left` is negative."""
    if left < 0:
        return arith.shrui(word, constant(-left))
    return arith.shli(word, constant(left))


def e4m3_scales(word, half: int, unit, dtype: Any):
    """Two floats of the positive e4m3 in byte `2 * half + unit / 2` of a word.

    `unit` is an i32 of 0 .. 3. Of bfloat16 they are 2^118 times the scale: what makes up for the
    exponents of e2m1 (2^126) and leaves room for the largest scale.
    """
    word = arith.shrui(word, constant(16 * half)) if half else word
    shift = arith.shli(arith.andi(unit, constant(2)), constant(2))
    byte = arith.andi(arith.shrui(word, shift), constant(0x7F))
    both = arith.ori(byte, arith.shli(byte, constant(16)))
    wide = dtype == jnp.bfloat16
    both = arith.shli(both, constant(4 if wide else 7))
    for power in (127, 111) if wide else (8,):  # 2^-120 or 2^-8 of it so far
        both = multiply_add(both, power_pair(power, dtype), None, dtype)
    return both


def power_pair(exponent: int, dtype: Any):
    """Two floats `2**exponent`, of the normal ones."""
    half = (exponent + 127) << 7 if dtype == jnp.bfloat16 else (exponent + 15) << 10
    return constant(half << 16 | half)


def float_pair(value: float, dtype: Any):
    """Two floats of a constant."""
    half = int(np.asarray(value, dtype).view(np.uint16))
    return constant(half << 16 | half)


def multiply_add(x, y, z, dtype: Any):
    """`x * y + z` of two floats each, rounded once; z None: none is added."""
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    z = constant(0x80008000) if z is None else z
    return _asm(f"fma.rn.{kind}x2 $0, $1, $2, $3;", "=r,r,r,r", x, y, z)


def as_float(x):
    """The float32 of a signed i32, rounded."""
    return arith.sitofp(ir.F32Type.get(), x)


def scaled(x, factor: float):
    """A float32 times a constant."""
    return arith.mulf(x, arith.constant(ir.F32Type.get(), factor))


def scaled_pair(x, factor: float, dtype: Any):
    """Two floats `x * factor` of a float32, rounded once if factor is a power of two."""
    kind = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
    half = arith.truncf(kind, scaled(x, factor))
    return as_word(vector([half, half]))


def mma(acc, a, b, dtype: Any):
    """`acc + a @ b` with four, four and two registers."""
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    f32 = ir.F32Type.get()
    out = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*a, *b, *acc],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, out, [i]) for i in range(4)]


def mma_integers(acc, a, b):
    """`acc + a @ b` of signed bytes and int32: four registers of sums; 4 and 2, or 2 and 1."""
    i32 = ir.IntegerType.get_signless(32)
    names = iter(f"${i}" for i in range(4, 8 + len(a) + len(b)))
    left, right, sums = (", ".join(next(names) for _ in operands) for operands in (a, b, acc))
    out = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4),
        [*a, *b, *acc],
        f"mma.sync.aligned.m16n8k{16 * len(b)}.row.col.s32.s8.s8.s32 "
        f"{{$0,$1,$2,$3}}, {{{left}}}, {{{right}}}, {{{sums}}};",
        ",".join(["=r"] * 4 + ["r"] * (len(a) + len(b) + 4)),
        has_side_effects=False,
    )
    return [llvm.extractvalue(i32, out, [i]) for i in range(4)]


def transpose(word):
    """An 8 x 8 matrix of 16 bits, a row in four threads, transposed."""
    return _asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", word)


def permute(low, high, selector: int):
    """Bytes by number: 0 .. 3 of `low`, 4 .. 7 of `high`; lowest nibble first."""
    return _asm("prmt.b32 $0, $1, $2, $3;", "=r,r,r,n", low, high, constant(selector))


def shuffle(x, distance: int):
    """The float32 of the thread whose number in the warp differs in the bit `distance`."""
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
    return llvm.inline_asm(x.type, [x], text, "=f,f", has_side_effects=True)


def binary(name: str, x, y):
    """An instruction of two float32."""
    return llvm.inline_asm(x.type, [x, y], f"{name} $0, $1, $2;", "=f,f,f", has_side_effects=False)


def fma_f32(x, y, z):
    """`x * y + z` of float32."""
    text = "fma.rn.f32 $0, $1, $2, $3;"
    return llvm.inline_asm(x.type, [x, y, z], text, "=f,f,f,f", has_side_effects=False)


def _asm(text: str, constraints: str, *operands):
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(operands), text, constraints, has_side_effects=False)


def constant(value: int):
    """A word of the 32 bits of `value`."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value - (1 << 32) * (value >> 31)))


def zero_f32():
    """The float32 zero."""
    return arith.constant(ir.F32Type.get(), 0.0)


def _bitcast(x, target):
    return x if x.type == target else llvm.bitcast(target, x)


def as_word(pair):
    """A vector of two 16-bit floats as i32."""
    return _bitcast(pair, ir.IntegerType.get_signless(32))


def as_words(reg):
    """A vector of four 16-bit floats as two i32."""
    return lanes(_bitcast(reg, ir.VectorType.get((2,), ir.IntegerType.get_signless(32))))


def lane(reg, i: int):
    """An element of a vector."""
    position = ir.DenseI64ArrayAttr.get([i])
    return vectors.extract(reg, dynamic_position=[], static_position=position)


def lanes(reg):
    """The elements of a vector."""
    return [lane(reg, i) for i in range(ir.VectorType(reg.type).shape[0])]


def vector(parts):
    """A vector of elements."""
    kind = ir.VectorType.get((len(parts),), parts[0].type)
    return vectors.from_elements(kind, list(parts))
