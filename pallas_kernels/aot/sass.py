"""Counts instructions in SASS, the machine code of NVIDIA GPUs, as `cuobjdump -sass` prints it.

A decode kernel reads each weight once, so what it spends on a weight is the length of its hot loop
over the weights that a thread uses up in one iteration. `hot_loop` finds that loop among those that
hold no other loop, or takes the whole kernel if it has none (unrolled by ptxas).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
# "/*0010*/   @!P0 LDG.E.128 R4, [R2.64] ;": address, predicate, opcode, operands.
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,8})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)([^;]*);"
)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_BITS_OF_LOAD = re.compile(r"\.(?:[US])?(8|16|32|64|128|256)(?:\.|$)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: address in bytes, opcode with its suffixes, operands as text."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without suffixes: "LDG" of "LDG.E.128"."""
        return self.opcode.split(".")[0]

    @property
    def jump(self) -> int | None:
        """Address that a branch goes to; None for other instructions."""
        target = _TARGET.search(self.operands) if self.name == "BRA" else None
        return int(target.group(1), 16) if target else None


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop's body, or a whole kernel without loops."""

    instructions: tuple[Instruction, ...]  # by their addresses, the closing branch included
    whole_kernel: bool

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def opcodes(self) -> dict[str, int]:
        """How often each opcode (without suffixes) occurs, the most frequent first."""
        return dict(collections.Counter(i.name for i in self.instructions).most_common())

    @property
    def float32_fmas(self) -> int:
        """Float32 multiply-adds; FFMA2 (sm_100 and newer) does two."""
        counts = self.opcodes
        return counts.get("FFMA", 0) + 2 * counts.get("FFMA2", 0)

    @property
    def global_bytes(self) -> int:
        """Bytes that a thread loads from global memory, or through pointers to any memory (LD)."""
        return sum(self._loads())

    @property
    def vector_bytes(self) -> int:
        """Those of `global_bytes` that come by 8 and more: weights, and not their scales."""
        return sum(size for size in self._loads() if size >= 8)

    def _loads(self) -> list[int]:
        loads = ("LDG", "LDGSTS", "LD")
        return [_load_bytes(i.opcode) for i in self.instructions if i.name in loads]


def functions(text: str) -> dict[str, tuple[Instruction, ...]]:
    """The instructions of each function in the output of `cuobjdump -sass`."""
    starts = list(_FUNCTION.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {
        match.group(1): tuple(
            Instruction(int(address, 16), opcode, operands.strip())
            for address, opcode, operands in _INSTRUCTION.findall(text, match.end(), end)
        )
        for match, end in zip(starts, ends, strict=True)
    }


def hot_loop(instructions: tuple[Instruction, ...], work: Callable[[Loop], float] = len) -> Loop:
    """The innermost loop that does the most work, or everything if there is no loop.

    A loop is what lies between a backward branch and its target. The endless branch to itself with
    which a function is padded is none. `work` is what an iteration does: by its instructions, a
    loop that prepares the activations can seem the largest; by the weights that it uses up it is
    not. Among equals the longest wins.
    """
    jumps = {(i.jump, i.address) for i in instructions if i.jump is not None}
    spans = {(start, end) for start, end in jumps if start < end}

    def holds(span, other):
        return span[0] <= other[0] and other[1] <= span[1] and span != other

    innermost = [span for span in spans if not any(holds(span, other) for other in spans)]
    if not innermost:
        # NOPs and the endless branch pad the end.
        used = tuple(i for i in instructions if i.name != "NOP" and i.jump != i.address)
        return Loop(used, whole_kernel=True)
    loops = [
        Loop(tuple(i for i in instructions if start <= i.address <= end), whole_kernel=False)
        for start, end in innermost
    ]
    return max(loops, key=lambda loop: (work(loop), len(loop)))


def _load_bytes(opcode: str) -> int:
    bits = _BITS_OF_LOAD.search(opcode)
    return int(bits.group(1)) // 8 if bits else 4
