"""What a compiled program launches and copies, read from XLA's thunk sequence and its HLO.

The thunk sequence is the list of what the GPU executable does, one line for each kernel, library
call, copy or memset, with the bodies of loops indented below them. The HLO says less: several of
its instructions become no launch (bitcasts, tuples), one may become several. So launches are
counted in the sequence, and the HLO gives names, sizes and trip counts.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

# Thunks that only hold or order others.
_CONTAINERS = frozenset(
    {"kAsyncDone", "kAsyncStart", "kCommandBuffer", "kConditional", "kDynamicSlice"}
    | {"kDynamicSliceFusion", "kSequential", "kWaitForStreams", "kWhile"}
)
_LINE = re.compile(r"^(\s*)(\d+): (k\w+)\s*(?:\[[^\]]*\])?\s*(.*)$")
_SECTION = re.compile(r"^\s*(condition|body|branch\S*):\s*$")
_METADATA = re.compile(
    r'profile_annotation: "([^"]*)"\s*\n\s*thunk_id: (\d+)\s*\n\s*}\s*\n\s*thunk_kind: "(\w+)"'
)
_RESULT = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\(", re.MULTILINE)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Instructions that write nothing of their own, or whose called computations do.
_WRITES_NOTHING = frozenset(
    {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional"}
    | {"call", "opt-barrier", "async-start", "async-update", "async-done", "copy-done"}
)
_SOURCES = re.compile(
    r'^\s*(?:ROOT )?%([\w.\-]+) = [^\n]*?metadata=\{op_name="([^"]*)"', re.MULTILINE
)
_TRIPS = re.compile(r'%([\w.\-]+) = [^\n]*? while\([^\n]*?"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"(pred|[a-z]+[0-9]+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BITS = re.compile(r"^[a-z]+(\d+)")

LARGE = 1 << 19
"""Bytes from which a result is listed: above the activations of a decode step, below its weights
and its cache."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy thunk: its HLO instruction, what it copies ("bf16[1,128]"), bytes, executions."""

    instruction: str
    shape: str
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class LargeResult:
    """An instruction that writes a buffer of at least `LARGE` bytes, other than in place."""

    instruction: str  # name in the HLO
    operation: str  # "copy", "fusion", "custom-call" ...
    shape: str  # "bf16[2560,3584]"; of several results the largest
    bytes: int  # of that, in one execution
    source: str  # what the user wrote: JAX's name of the operation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launches:
    """What one execution of a program launches.

    Bodies of loops count times their trip count; where the compiler does not know it
    (`unknown_loops`) once, and their condition (and a copy of it to the host) not at all. Kinds are
    "mosaic", "kernel" (XLA's own), "copy", and names of thunks.
    """

    launches: int = 0
    launch_kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    copies: tuple[Copy, ...] = ()
    sequence: tuple[str, ...] = ()  # in order: kind, HLO instruction, JAX's name of what it does
    large_results: tuple[LargeResult, ...] = ()  # copied, converted or sliced weights or caches


def count(thunk_sequence: str, thunk_metadata: str, hlo: str) -> Launches:
    """Reads the files `*thunk_sequence.txt`, `*thunk_metadata.txt` and the optimized HLO."""
    names = {int(i): name for name, i, _ in _METADATA.findall(thunk_metadata)}
    shapes = {name: shape for name, shape, _ in _RESULT.findall(hlo)}
    trips = {name: int(n) for name, n in _TRIPS.findall(hlo)}
    mosaic = set(re.findall(r'%([\w.\-]+) = [^\n]*custom_call_target="mosaic_gpu', hlo))
    kinds: collections.Counter[str] = collections.Counter()
    copies: list[Copy] = []
    sequence: list[str] = []
    sources = dict(_SOURCES.findall(hlo))
    unknown = 0
    # Loops around the current line: (indentation, times that its body runs).
    around: list[tuple[int, int]] = []
    named: dict[int, str] = {}  # what encloses the current line, by indentation
    skipped: int | None = None  # indentation of a condition that is not counted
    for line in thunk_sequence.splitlines():
        indent = len(line) - len(line.lstrip())
        if section := _SECTION.match(line):
            # XLA evaluates no condition where the trip count is known. The line "condition:" of a
            # loop stands left of what it holds; "body:" is indented by two.
            skipped = indent if section.group(1) == "condition" else None
            continue
        match = _LINE.match(line)
        if match is None or (skipped is not None and indent > skipped):
            continue
        skipped = None
        while around and indent <= around[-1][0]:
            around.pop()
        number, kind, rest = int(match.group(2)), match.group(3), match.group(4)
        # A copy inside a dynamic-slice fusion has no name of its own.
        named = {depth: other for depth, other in named.items() if depth < indent}
        name = names.get(number) or named.get(max(named, default=0), "")
        named[indent] = name
        times = math.prod(n for _, n in around)
        if kind == "kWhile":
            known = trips.get(name)
            unknown += known is None
            around.append((indent, known or 1))
        if kind in _CONTAINERS:
            continue
        if kind == "kCopy":
            shape = shapes.get(name, "")
            plain = re.sub(r"\{[^{}]*\}", "", shape)
            copies.append(Copy(name, plain, array_bytes(shape), times))
        word = _kind(kind, rest, name in mosaic)
        kinds[word] += times
        often = f" x {times}" if times > 1 else ""
        sequence.append(f"{word}{often} {name}: {sources.get(name, '')}")
    return Launches(
        launches=sum(kinds.values()),
        launch_kinds=dict(kinds.most_common()),
        unknown_loops=unknown,
        copies=tuple(copies),
        sequence=tuple(sequence),
        large_results=large_results(hlo),
    )


def large_results(hlo: str, at_least: int = LARGE) -> tuple[LargeResult, ...]:
    """The instructions of a program that write `at_least` bytes and more into a fresh buffer.

    Only what runs by itself is looked at: the entry computation and the bodies of loops and
    branches, not the inside of fusions. An update in place (a fusion whose root is a
    dynamic-update-slice, a custom call with aliases) writes no fresh buffer.
    """
    computations = _computations(hlo)
    entry = re.search(r"^ENTRY %([\w.\-]+) ", hlo, re.MULTILINE)
    waiting = [entry.group(1)] if entry else []
    seen: set[str] = set()
    found: list[LargeResult] = []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for _, instruction, shape, operation, rest in computations.get(name, []):
            called = [c.lstrip("%") for m in _CALLED.findall(rest) for c in m.split(", ")]
            if operation in ("while", "conditional", "call", "async-start"):
                waiting += called
            # Of several results the largest: fusions of many small things are none.
            arrays = [f"{dtype}[{sizes}]" for dtype, sizes in _ARRAY.findall(shape)]
            largest = max(arrays, key=array_bytes, default="")
            size = array_bytes(largest)
            if operation in _WRITES_NOTHING or size < at_least:
                continue
            in_place = "output_to_operand_aliasing" in rest or operation == "dynamic-update-slice"
            if operation == "fusion":
                in_place |= any(_updates_in_place(computations, c) for c in called)
            if not in_place:
                source = match.group(1) if (match := _OP_NAME.search(rest)) else ""
                found.append(LargeResult(instruction, operation, largest, size, source))
    return tuple(sorted(found, key=lambda result: -result.bytes))


_Line = tuple[str, str, str, str, str]


def _computations(hlo: str) -> dict[str, list[_Line]]:
    """(ROOT or "", name, shape, operation, rest of the line) of each instruction."""
    found: dict[str, list[_Line]] = {}
    current: list[_Line] = []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = found.setdefault(match.group(1), [])
        elif match := _INSTRUCTION.match(line):
            root, name, shape, operation, rest = match.groups()
            current.append((root or "", name, shape, operation, rest))
    return found


def _updates_in_place(computations: dict[str, list[_Line]], name: str) -> bool:
    """Whether a fusion's root is an update of a slice, seen through bitcasts and tuples."""
    lines = {line[1]: line for line in computations.get(name, [])}
    waiting = [line for line in lines.values() if line[0]]
    operations = []
    while waiting:
        _, _, _, operation, rest = waiting.pop()
        if operation in ("bitcast", "tuple"):
            operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            waiting += [lines[operand] for operand in operands if operand in lines]
        else:
            operations.append(operation)
    return bool(operations) and {*operations} <= {"dynamic-update-slice", "scatter"}


def array_bytes(shape: str) -> int:
    """Bytes of the arrays in a shape as HLO writes it: "(s32[], bf16[8,128]{1,0})"."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.match(dtype)
        width = 8 if dtype == "pred" or bits is None else int(bits.group(1))
        total += math.prod(int(n) for n in sizes.split(",") if n) * width // 8
    return total


def _kind(kind: str, rest: str, mosaic: bool) -> str:
    if mosaic:
        return "mosaic"
    if kind in ("kCustomKernel", "kKernel"):
        return "gemm fusion" if rest.startswith("gemm_fusion") else "kernel"
    words = {"kCopy": "copy", "kCustomCall": "custom call", "kMemset32BitValue": "memset"}
    return words.get(kind, kind.removeprefix("k"))
