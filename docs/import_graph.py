"""Which module imports which, read from the sources: what the import tests and the picture need.

A module counts as imported by another if it runs because of it while that one is being imported:
the module named, and the packages above it, whose `__init__` runs first. The packages above the
importer itself do not count: they are being imported already. An import inside a function is
`lazy`: it can close no circle, but it is an arrow like any other. What stands under
`if TYPE_CHECKING:` never runs and is left out.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = {
    "pallas_kernels": ROOT / "pallas_kernels",
    "fdq": ROOT / "fdq",
    "fdq_checkpoints": ROOT / "checkpoints" / "fdq_checkpoints",
    "benchmarks": ROOT / "benchmarks",
    "examples": ROOT / "examples",
}
"""Where each package lies."""

LEVELS = (
    "pallas_kernels.device pallas_kernels.transformations pallas_kernels.typing",
    "pallas_kernels.mosaic pallas_kernels.aot pallas_kernels.tuning",
    "pallas_kernels.weights",
    "pallas_kernels.cache",
    "pallas_kernels.matmul pallas_kernels.attention",
    "pallas_kernels.append pallas_kernels.router",
    "pallas_kernels.__init__",
    "fdq.processes fdq.registry fdq.requirements fdq.text_table fdq.user_cache",
    "fdq.schemes",
    "fdq.formats",
    "fdq.cache",
    "fdq.quantizers",
    "fdq.ops",
    "fdq.nn fdq.linen",
    "fdq.models",
    "fdq.sharding",
    "fdq.calibration",
    "fdq.quantizers.modules fdq.quantizers.layer_inputs",
    "fdq.quantizers.assigned",
    "fdq.quantizers.rotated",
    "fdq.quantizers.channel_scales",
    "fdq.quantizers.smooth fdq.quantizers.awq",
    "fdq.quantizers.preparation",
    "fdq.quantizers.quantization",
    "fdq.quantizers.fake_quantization fdq.quantizers.in_order",
    "fdq.adapters",
    "fdq.decoding",
    "fdq.storage",
    "fdq.analysis",
    "fdq.healing",
    "fdq.__init__",
    "fdq_checkpoints.errors fdq_checkpoints.slabs",
    "fdq_checkpoints.tree_paths",
    "fdq_checkpoints.readers",
    "fdq_checkpoints.destinations",
    "fdq_checkpoints.store",
    "fdq_checkpoints.sources",
    "fdq_checkpoints.stream",
    "fdq_checkpoints.saving",
    "fdq_checkpoints.loading fdq_checkpoints.inspection fdq_checkpoints.export "
    "fdq_checkpoints.joint_conversion",
    "fdq_checkpoints.conversion fdq_checkpoints.exporting fdq_checkpoints.peft",
    "fdq_checkpoints.__init__",
    "fdq.cli",
    "benchmarks examples",
)
"""Rooms, the lowest first: a module imports its own room and lower ones, none beside it or above.

A module belongs to the longest name here that it starts with.
"""

UPWARD = ("fdq.storage", "fdq.analysis")
"""Whose functions import `fdq_checkpoints`, although it stands above them, when they are called."""


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: `module` is imported by `importer`, at `line` of its file."""

    importer: str
    module: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{files()[self.importer].relative_to(ROOT)}:{self.line} imports {self.module}"


@functools.cache
def files() -> dict[str, pathlib.Path]:
    """The file of each module, by dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def room(module: str) -> str:
    """The room in LEVELS that a module belongs to.

    Raises:
      KeyError: it has none yet.
    """
    parts = (module if "." in module else f"{module}.__init__").split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in _heights():
            return name
    raise KeyError(f"{module} has no place in LEVELS of docs/import_graph.py")


def height(room: str) -> int:
    """How high a room stands, from 0."""
    return _heights()[room]


@functools.cache
def imports() -> tuple[Import, ...]:
    """Every import in every module, those of other people's packages too."""
    return tuple(one for module in files() for one in _imports_of(module))


def own_imports() -> Iterator[Import]:
    """Imports of our own modules, with those of the packages above them that run too."""
    known = files()
    for one in imports():
        if one.module not in known:
            continue
        yield one
        parts = one.module.split(".")
        for length in range(1, len(parts)):
            package = ".".join(parts[:length])
            if not f"{one.importer}.".startswith(f"{package}."):
                yield dataclasses.replace(one, module=package)


def goes_up(one: Import) -> bool:
    """Whether this is one of the few arrows that may go up: files are opened by who is asked to."""
    return one.lazy and room(one.importer) in UPWARD and one.module.startswith("fdq_checkpoints")


def circles() -> list[list[str]]:
    """Groups of modules that import each other in a circle, inside functions or not.

    They are the strongly connected components of the graph (Tarjan, SIAM J. Comput. 1972).
    """
    targets: dict[str, set[str]] = {module: set() for module in files()}
    for one in own_imports():
        if goes_up(one):
            continue
        targets[one.importer].add(one.module)
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        path.append(module)
        for target in sorted(targets[module]):
            if target not in order:
                visit(target)
            if target in path:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == order[module]:
            group = path[path.index(module) :]
            del path[path.index(module) :]
            if len(group) > 1 or module in targets[module]:
                found.append(sorted(group))

    for module in targets:
        if module not in order:
            visit(module)
    return sorted(found)


@functools.cache
def _heights() -> dict[str, int]:
    return {room: height for height, rooms in enumerate(LEVELS) for room in rooms.split()}


def _imports_of(module: str) -> Iterator[Import]:
    path = files()[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node, lazy in _statements(ast.parse(path.read_text()).body, lazy=False):
        for name in _names(node, package):
            yield Import(module, name, node.lineno, lazy)


def _names(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        above = parts[: len(parts) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    # `from fdq import nn` imports the module fdq.nn; `from fdq.nn import Linear` imports fdq.nn.
    yield from sorted({f"{base}.{a.name}" if f"{base}.{a.name}" in files() else base
                       for a in node.names})  # fmt: skip


def _statements(
    body: Iterable[ast.AST], *, lazy: bool
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _statements(node.orelse, lazy=lazy)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(ast.iter_child_nodes(node), lazy=lazy or inside)
