"""Runs straight-line PTX in NumPy, all threads of one block at a time.

For kernels without branches, of which every thread computes its own numbers: what the compiler made
of them is executed to the last bit, subnormals and named roundings included, where there is no GPU.
Instructions that it does not know are errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

# Barriers, and what Mosaic puts at the start of every kernel for sm_90.
_IGNORED = (".reg", "bar.sync", "elect.sync", "fence.")

_SIGNED, _UNSIGNED, _FLOAT = np.int32, np.uint32, np.float32


class Machine:
    """A block of threads: registers are uint32 (or uint64, predicates bool) arrays of all threads.

    Args:
      parameters: arrays in the order of the kernel's pointers; stores change them in place.
      threads: of the block.
    """

    def __init__(self, parameters: Sequence[np.ndarray], threads: int = 128):
        self.memory = [a.reshape(-1).view(_UNSIGNED) for a in parameters]
        self.threads = threads
        self.registers: dict[str, np.ndarray] = {}

    def run(self, ptx: str) -> None:
        """Executes the only kernel of a module."""
        body = ptx[ptx.index("\n{") :]
        body = re.sub(r"//[^\n]*|\.loc[^\n]*|^\$?\w+:", "", body, flags=re.MULTILINE)
        body = body[: body.index("ret;")]
        for statement in re.split("[;{}]", _braces_of_vectors(body)):
            statement = statement.strip()
            if statement and not statement.startswith(_IGNORED):
                self._execute(statement)

    def _execute(self, statement: str) -> None:
        opcode, rest = statement.split(maxsplit=1)
        operands = [o.strip() for o in re.split(r",(?![^(]*\))", rest)]
        name, _, suffix = opcode.partition(".")
        handler = getattr(self, f"_{name}", None)
        if handler is None:
            raise NotImplementedError(f"PTX machine: {statement!r}")
        handler(suffix, operands)

    def _value(self, operand: str, dtype: type = _UNSIGNED) -> np.ndarray:
        if operand in self.registers:
            register = self.registers[operand]
            return register if register.dtype.itemsize != 4 else register.view(dtype)
        if operand == "%tid.x":
            return np.arange(self.threads, dtype=_UNSIGNED)
        is_float = operand.startswith("0f")
        bits = int(operand[2:], 16) if is_float else int(operand, 0) & 0xFFFFFFFF
        return np.full(self.threads, bits, _UNSIGNED).view(dtype)

    def _set(self, operand: str, value: np.ndarray) -> None:
        value = np.broadcast_to(value, (self.threads,))
        if value.dtype.itemsize == 4:
            value = np.ascontiguousarray(value).view(_UNSIGNED)
        self.registers[operand] = value

    # Memory: an address is the number of a parameter in the upper half and bytes in the lower.

    def _ld(self, suffix: str, operands: list[str]) -> None:
        target, place = operands
        if suffix.startswith("param"):
            number = int(re.findall(r"param_(\d+)\]", place)[0])
            self._set(target, np.full(self.threads, number << 32, np.uint64))
            return
        registers = _vector(target)
        for i, register in enumerate(registers):
            memory, index = self._address(place)
            self._set(register, memory[index + i])

    def _st(self, suffix: str, operands: list[str]) -> None:
        place, source = operands
        for i, register in enumerate(_vector(source)):
            memory, index = self._address(place)
            memory[index + i] = self._value(register)

    def _address(self, place: str) -> tuple[np.ndarray, np.ndarray]:
        register, _, offset = place.strip("[]").partition("+")
        address = self.registers[register] + np.uint64(int(offset or 0))
        (number,) = np.unique(address >> np.uint64(32))
        return self.memory[int(number)], ((address & np.uint64(0xFFFFFFFF)) // 4).astype(np.int64)

    def _cvta(self, suffix: str, operands: list[str]) -> None:
        self.registers[operands[0]] = self.registers[operands[1]]

    # Arithmetic.

    def _mov(self, suffix: str, operands: list[str]) -> None:
        self._set(operands[0], self._value(operands[1]))

    def _and(self, suffix: str, operands: list[str]) -> None:
        self._set(operands[0], self._value(operands[1]) & self._value(operands[2]))

    def _or(self, suffix: str, operands: list[str]) -> None:
        self._set(operands[0], self._value(operands[1]) | self._value(operands[2]))

    def _shl(self, suffix: str, operands: list[str]) -> None:
        self._set(operands[0], self._value(operands[1]) << self._value(operands[2]))

    def _shr(self, suffix: str, operands: list[str]) -> None:
        dtype = _SIGNED if suffix == "s32" else _UNSIGNED
        self._set(operands[0], self._value(operands[1], dtype) >> self._value(operands[2], dtype))

    def _bfe(self, suffix: str, operands: list[str]) -> None:
        start, length = (int(o) for o in operands[2:])
        dtype = _SIGNED if suffix == "s32" else _UNSIGNED
        top = self._value(operands[1]) << _UNSIGNED(32 - start - length)
        self._set(operands[0], top.view(dtype) >> dtype(32 - length))

    def _shf(self, suffix: str, operands: list[str]) -> None:
        low, high, count = (self._value(o).astype(np.uint64) for o in operands[1:])
        wide, count = high << np.uint64(32) | low, count & np.uint64(31)
        if suffix == "r.wrap.b32":
            wide = wide >> count
        elif suffix == "l.wrap.b32":
            wide = wide << count >> np.uint64(32)
        else:
            raise NotImplementedError(f"PTX machine: shf.{suffix}")
        self._set(operands[0], wide.astype(_UNSIGNED))

    def _mul(self, suffix: str, operands: list[str]) -> None:
        if suffix == "wide.u32":
            a, b = (self._value(o).astype(np.uint64) for o in operands[1:])
            self.registers[operands[0]] = a * b
        elif suffix in ("f32", "rn.f32"):
            a, b = (self._value(o, _FLOAT) for o in operands[1:])
            self._set(operands[0], a * b)
        else:
            raise NotImplementedError(f"PTX machine: mul.{suffix}")

    def _add(self, suffix: str, operands: list[str]) -> None:
        target, *sources = operands
        if suffix in ("s64", "u64"):
            a, b = (
                self.registers[o] if o in self.registers else np.uint64(int(o)) for o in sources
            )
            self.registers[target] = a + b
        elif suffix in ("s32", "u32"):
            self._set(target, self._value(sources[0]) + self._value(sources[1]))
        elif suffix in ("f32", "rn.f32", "rm.f32"):
            a, b = (self._value(o, _FLOAT) for o in sources)
            self._set(target, add_downwards(a, b) if suffix == "rm.f32" else a + b)
        else:
            raise NotImplementedError(f"PTX machine: add.{suffix}")

    def _setp(self, suffix: str, operands: list[str]) -> None:
        compare = {"eq.b32": np.equal, "ne.b32": np.not_equal}[suffix]
        self._set(operands[0], compare(self._value(operands[1]), self._value(operands[2])))

    def _selp(self, suffix: str, operands: list[str]) -> None:
        yes, no = self._value(operands[1]), self._value(operands[2])
        self._set(operands[0], np.where(self.registers[operands[3]], yes, no))

    def _shfl(self, suffix: str, operands: list[str]) -> None:
        target, source, lane, clamp, mask = operands
        if suffix != "sync.idx.b32" or (clamp, mask) != ("31", "-1"):
            raise NotImplementedError(f"PTX machine: shfl.{suffix} {operands}")
        warps = np.arange(self.threads) // 32 * 32
        self._set(target, self._value(source)[warps + self._value(lane) % 32])


def add_downwards(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 ``a + b`` rounded toward minus infinity."""
    nearest = a + b
    # What rounding to nearest left out, exactly (Knuth's two-sum).
    b_part = nearest - a
    left_out = (a - (nearest - b_part)) + (b - b_part)
    return np.where(left_out < 0, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _braces_of_vectors(body: str) -> str:
    """``{%r1, %r2}`` -> ``(%r1, %r2)``, so that braces are blocks only."""
    return re.sub(r"\{(\s*%\w+(?:\s*,\s*%\w+)*\s*)\}", r"(\1)", body)


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("()").split(",")]
