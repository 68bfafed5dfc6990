"""Tables and sizes as text: aligned for people, Markdown for pages."""

import re
from collections.abc import Collection, Sequence

# A component of a path that is a number, or the number at its end after an underscore.
_NUMBER = re.compile(r"(?:^|(?<=[._]))\d+(?=\.|$)")


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), indent: str = "") -> str:
    """Columns as wide as their widest cell, two spaces apart; a heading is a row like the others.

    A row shorter than others lacks the columns at its end; `right` are columns, counted from 0, of
    figures, which end at the same place.
    """
    columns = range(max(map(len, rows), default=0))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in columns]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def folded(rows: Sequence[tuple[str, ...]]) -> list[tuple[int, tuple[str, ...]]]:
    """Rows that differ only in numbers of their first cell, a dotted path, become one row.

    `layers.0.norm` and `layers.1.norm` become `layers.{0..1}.norm`. Before each row stands how many
    it stands for; the order is that of the first of each.
    """
    found, before = [(1, row) for row in rows], -1
    while len(found) != before:
        before = len(found)
        for position in range(2):  # layer and expert: the one may be folded already, or the other
            found = _folded_at(found, position)
    return found


def _folded_at(
    rows: list[tuple[int, tuple[str, ...]]], position: int
) -> list[tuple[int, tuple[str, ...]]]:
    """`folded` by one number of each path, counted from the left."""
    groups: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    for count, (path, *cells) in rows:
        numbers = list(_NUMBER.finditer(path))[position : position + 1]
        template, number = path, ""
        for one in numbers:
            template, number = path[: one.start()] + "\0" + path[one.end() :], one.group()
        groups.setdefault((template, *cells), []).append((count, number))
    return [
        (
            sum(count for count, _ in members),
            (template.replace("\0", _ranges([number for _, number in members])), *cells),
        )
        for (template, *cells), members in groups.items()
    ]


def _ranges(numbers: list[str]) -> str:
    """`["0", "1", "2", "5"]` -> `"{0..2,5}"`."""
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[int]] = []
    for number in sorted(int(number) for number in numbers if number):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


def size(count: float) -> str:
    """Bytes in the decimal unit in which they have digits: "812 bytes", "8.81 MB"."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(str(int(abs(count)))))
    return f"{count:.{digits}f} {units[power]}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: names on the left, figures on the right; no line end after the last row."""
    text = ["| " + " | ".join(line) + " |" for line in (columns, *rows)]
    text.insert(1, "|---|" + "---:|" * (len(columns) - 1))
    return "\n".join(text)
