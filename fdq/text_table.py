"""Tables and sizes as text: aligned for people, Markdown for pages."""

from collections.abc import Collection, Sequence


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
