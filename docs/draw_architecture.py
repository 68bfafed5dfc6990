"""Draws `docs/architecture.svg`: the rooms of the three packages and who imports whom.

    python -m docs.draw_architecture          # writes the picture
    python -m docs.draw_architecture --check  # fails if it is not what the code says

Nothing in the picture is written down here: names and sentences are those of the code, arrows are
its imports. An arrow that follows from others is left out. The layout is Sugiyama's: rows by
import, long arrows bent around boxes, the order in a row and places found by averaging.
"""

from __future__ import annotations

import ast
import collections
import itertools
import pathlib
import statistics
import sys
import textwrap

from docs import import_graph
from fdq.analysis.svg import Picture

PICTURE = pathlib.Path(__file__).with_name("architecture.svg")

# Rooms that half of the code imports, or that nothing does, would only add arrows.
HIDDEN = {
    "pallas_kernels.device",
    "pallas_kernels.transformations",
    "pallas_kernels.typing",
    "fdq.processes",
    "fdq.registry",
    "fdq.requirements",
    "fdq.text_table",
    "fdq.user_cache",
    "fdq_checkpoints.errors",
    "fdq_checkpoints.tree_paths",
    "benchmarks",
    "examples",
}
# Several rooms of LEVELS in one box, for a reader who does not look so closely.
TOGETHER = {
    "fdq.quantizers.layer_inputs": "fdq.quantizers.quantization",
    "fdq.quantizers.modules": "fdq.quantizers.quantization",
    "fdq.quantizers.assigned": "fdq.quantizers.quantization",
    "fdq_checkpoints.stream": "fdq_checkpoints.__init__",
    "fdq_checkpoints.saving": "fdq_checkpoints.__init__",
    "fdq_checkpoints.loading": "fdq_checkpoints.__init__",
    "fdq_checkpoints.inspection": "fdq_checkpoints.__init__",
    "fdq_checkpoints.joint_conversion": "fdq_checkpoints.__init__",
    "fdq_checkpoints.conversion": "fdq_checkpoints.__init__",
    "fdq_checkpoints.export": "fdq_checkpoints.__init__",
    "fdq_checkpoints.exporting": "fdq_checkpoints.__init__",
}
COLUMNS = (
    "fdq_checkpoints",
    "fdq",
    "pallas_kernels",
)  # from left to right, where all else is equal
TINTS = {"fdq": 0, "fdq_checkpoints": 1, "pallas_kernels": 2}

BOX_WIDTH, LINE, GAP, BEND_WIDTH, ROW_GAP, MARGIN = 222, 14, 14, 8, 38, 14
TEXT_WIDTH = 33  # characters of a sentence that fit into a box

Edge = tuple[str, str]


def boxes() -> list[str]:
    """Rooms that get a box."""
    names = [name for level in import_graph.LEVELS for name in level.split()]
    return [
        name
        for name in names
        if name not in HIDDEN | TOGETHER.keys()
        and name not in {"fdq.__init__", "pallas_kernels.__init__"}
    ]


def arrows() -> set[Edge]:
    """Pairs (importing box, imported box), without those that follow from others."""
    known = set(boxes())
    edges = set()
    for one in import_graph.own_imports():
        rooms = import_graph.room(one.importer), import_graph.room(one.module)
        here, there = (TOGETHER.get(name, name) for name in rooms)
        if here != there and {here, there} <= known and not import_graph.goes_up(one):
            edges.add((here, there))
    below = collections.defaultdict(set)
    for here, there in edges:
        below[here].add(there)

    def reachable(start: str) -> set[str]:
        found, ahead = set(), [start]
        while ahead:
            fresh = below[ahead.pop()] - found
            found |= fresh
            ahead += fresh
        return found

    return {
        (here, there)
        for here, there in edges
        if not any(there in reachable(other) for other in below[here] - {there})
    }


def rows(edges: set[Edge]) -> list[list[str]]:
    """Boxes row by row from the top, each as high as who imports it allows."""
    depth = dict.fromkeys(boxes(), 0)
    for _ in depth:
        for here, there in edges:
            depth[there] = max(depth[there], depth[here] + 1)
    # A box without importers stands right above the highest that it imports.
    for name in depth:
        if all(there != name for _, there in edges):
            lower = [depth[there] for here, there in edges if here == name]
            depth[name] = min(lower, default=1) - 1
    return [[n for n in depth if depth[n] == d] for d in range(max(depth.values()) + 1)]


def bent(levels: list[list[str]], edges: set[Edge]) -> dict[Edge, list[str]]:
    """The points of each arrow, one a row; adds a point to every row that an arrow passes."""
    depth = {name: d for d, row in enumerate(levels) for name in row}
    paths = {}
    for here, there in sorted(edges):
        passed = [f"{here}>{there}@{d}" for d in range(depth[here] + 1, depth[there])]
        for d, point in enumerate(passed, depth[here] + 1):
            levels[d].append(point)
        paths[here, there] = [here, *passed, there]
    return paths


def places(levels: list[list[str]], paths: dict[Edge, list[str]]) -> dict[str, float]:
    """The middle of every point from left to right, in pixels."""
    beside: dict[str, list[str]] = collections.defaultdict(list)
    for path in paths.values():
        for a, b in itertools.pairwise(path):
            beside[a].append(b)
            beside[b].append(a)
    columns = {package: index * 320.0 for index, package in enumerate(COLUMNS)}
    x = {point: columns[point.split(".")[0]] for row in levels for point in row}
    depth = {point: d for d, row in enumerate(levels) for point in row}
    for turn in range(60):  # the order in each row, from above and from below in turns
        for row in levels if turn % 2 == 0 else levels[::-1]:
            side = -1 if turn % 2 == 0 else 1
            wanted = {}
            for point in row:
                near = [x[o] for o in beside[point] if (depth[o] - depth[point]) * side > 0]
                wanted[point] = statistics.mean(near) if near else x[point]
            row.sort(key=wanted.__getitem__)
            x |= _apart(row, wanted)
    for _ in range(200):
        for row in levels:
            wanted = {p: statistics.mean([x[o] for o in beside[p]] or [x[p]]) for p in row}
            x |= _apart(row, wanted)
    left = min(x[point] - _width(point) / 2 for row in levels for point in row)
    return {point: place - left + MARGIN for point, place in x.items()}


def _apart(row: list[str], wanted: dict[str, float]) -> dict[str, float]:
    """The places nearest to those wanted in which nothing in a row overlaps.

    It is isotonic regression of what is wanted less the room that a point's left neighbours take.
    """
    offsets = [0.0]
    for a, b in itertools.pairwise(row):
        offsets.append(offsets[-1] + (_width(a) + _width(b)) / 2 + GAP)
    blocks: list[list[float]] = []
    for point, offset in zip(row, offsets, strict=True):
        blocks.append([wanted[point] - offset])
        while len(blocks) > 1 and statistics.mean(blocks[-2]) > statistics.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    flat = [statistics.mean(block) for block in blocks for _ in block]
    return {point: f + offset for point, f, offset in zip(row, flat, offsets, strict=True)}


def _width(point: str) -> float:
    return BEND_WIDTH if "@" in point else BOX_WIDTH


def sentence(box: str) -> list[str]:
    """The first sentence of a room's docstring, in lines."""
    path = import_graph.files()[box.removesuffix(".__init__")]
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    first = " ".join(text.replace("`", "").split()).split(". ")[0].split("; ")[0].rstrip(".")
    return textwrap.wrap(first, TEXT_WIDTH)


def drawing() -> str:
    """The picture as SVG."""
    edges = arrows()
    levels = rows(edges)
    paths = bent(levels, edges)
    x = places(levels, paths)
    top, y, heights = MARGIN, {}, {}
    for row in levels:
        heights |= {box: 26 + LINE * len(sentence(box)) for box in row if "@" not in box}
        tallest = max(heights[box] for box in row if "@" not in box)
        for point in row:
            height = heights.setdefault(point, tallest)
            y[point] = top + (tallest - height) // 2
        top += tallest + ROW_GAP
    wide = max(x[box] + BOX_WIDTH / 2 for box in boxes()) + MARGIN
    picture = Picture(round(wide))
    for path in paths.values():
        line = f"M{x[path[0]]:.0f},{y[path[0]] + heights[path[0]]:.0f}"
        for a, b in itertools.pairwise(path):
            start, end = y[a] + heights[a], y[b] - 2 * (b == path[-1])
            half = (start + end) / 2
            line += f" C{x[a]:.0f},{half:.0f} {x[b]:.0f},{half:.0f} {x[b]:.0f},{end:.0f}"
            if b != path[-1]:
                line += f" V{end + heights[b]:.0f}"
        picture.arrow(line)
    for box in boxes():
        middle, up = x[box], y[box]
        picture.box(middle - BOX_WIDTH / 2, up, BOX_WIDTH, heights[box], TINTS[box.split(".")[0]])
        name = box.removesuffix(".__init__")
        picture.text(middle, up + 18, name, anchor="middle", size=11, bold=True, mono=True)
        for index, text in enumerate(sentence(box)):
            picture.text(middle, up + 33 + LINE * index, text, anchor="middle", size=11, dim=True)
    return picture.svg(top - ROW_GAP + MARGIN, "Rooms of the three packages and their imports")


def main(arguments: list[str]) -> None:
    """Writes the picture, or with `--check` compares it with the one that is there."""
    picture = drawing()
    if arguments == ["--check"]:
        if not PICTURE.exists() or PICTURE.read_text() != picture:
            sys.exit(f"{PICTURE.name} is stale. Run python -m docs.draw_architecture.")
    elif arguments:
        sys.exit(__doc__)
    else:
        PICTURE.write_text(picture)


if __name__ == "__main__":
    main(sys.argv[1:])
