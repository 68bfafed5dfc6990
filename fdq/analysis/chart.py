"""Small charts as SVG text: lines, points and bars, without a library, for files and for HTML.

Colors follow the reader's: light or dark (`prefers-color-scheme`), on the background that is there.
Series differ by shape and dash as well as by color, and every mark has its values as a tooltip.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

STYLE = """
.fdq-chart{color-scheme:light dark;--ink:#24292f;--dim:#57606a;--grid:#d0d7de;--page:#ffffff;
--c0:#0969da;--c1:#bc4c00;--c2:#1a7f37;--c3:#8250df;font:12px system-ui,sans-serif}
@media (prefers-color-scheme:dark){.fdq-chart{--ink:#e6edf3;--dim:#9198a1;--grid:#3d444d;
--page:#0d1117;--c0:#58a6ff;--c1:#ffa657;--c2:#56d364;--c3:#d2a8ff}}
.fdq-chart .page{fill:var(--page)} .fdq-chart text{fill:var(--ink)}
.fdq-chart .dim{fill:var(--dim)} .fdq-chart .grid{stroke:var(--grid);stroke-width:1}
.fdq-chart .line{fill:none;stroke-width:2}
.fdq-chart .halo{paint-order:stroke;stroke:var(--page);stroke-width:3px}
"""
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 30, 46
BAR = 17  # a row of a bar chart
_DASHES = ("", "6 4", "2 3", "8 3 2 3")
Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], *, x: str, y: str, log_y: bool = False) -> str:
    """A line for each series, by name; `x` and `y` label the axes.

    Points that are not finite are left out, here and below.
    """
    series = {
        name: [point for point in points if all(map(math.isfinite, point))]
        for name, points in series.items()
    }
    whole = [point for points in series.values() for point in points]
    axes = _Axes(whole, x, y, log_y)
    body = axes.drawn()
    for i, (name, points) in enumerate(series.items()):
        path = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in points)
        color = f"var(--c{i % 4})"
        body.append(
            f'<polyline class="line" points="{path}" style="stroke:{color}" '
            f'stroke-dasharray="{_DASHES[i % 4]}"/>'
        )
        if len(points) <= 40:
            body += [_dot(axes, a, b, i, f"{name}: {_figure(a)}, {_figure(b)}") for a, b in points]
    return _svg(body + _legend(list(series)), HEIGHT)


def points(
    groups: Mapping[str, Sequence[tuple[str, float, float]]], *, x: str, y: str, log_y: bool = False
) -> str:
    """Labelled points `(label, x, y)` in groups, and a line along those that no other beats.

    The first group is drawn on top. Beaten is a point where another has no larger x and a smaller
    y, in all groups.
    """
    groups = {
        name: [(label, a, b) for label, a, b in members if math.isfinite(a) and math.isfinite(b)]
        for name, members in groups.items()
    }
    whole = [(a, b) for members in groups.values() for _, a, b in members]
    axes = _Axes(whole, x, y, log_y)
    body = axes.drawn()
    front = pareto(whole)
    path = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in front)
    body.append(
        f'<polyline class="line" points="{path}" style="stroke:var(--dim)" stroke-dasharray="3 4"/>'
    )
    taken: list[tuple[float, float, float]] = []
    dots: list[str] = []
    for i, (name, members) in enumerate(groups.items()):
        own = []
        for label, a, b in members:
            tip = f"{label} ({name}): {_figure(a)}, {_figure(b)}"
            own.append(_dot(axes, a, b, i, tip))
            body.append(_label(label, axes.x(a), axes.y(b), taken))
        dots = own + dots
    return _svg(body + dots + _legend(list(groups)), HEIGHT)


def pareto(found: Points) -> list[tuple[float, float]]:
    """The points that none beats, by x: none has no larger x and a smaller y."""
    front: list[tuple[float, float]] = []
    for a, b in sorted(found):
        if not front or b < front[-1][1]:
            front.append((a, b))
    return front


def bars(rows: Sequence[tuple[str, float, str]], *, x: str, kinds: Sequence[str] = ()) -> str:
    """A bar for each row `(label, length, kind)`; `kinds` in the order of their colors."""
    kinds = list(kinds) or list(dict.fromkeys(kind for _, _, kind in rows))
    rows = [row for row in rows if math.isfinite(row[1])]
    left = 16 + 6.4 * max((len(label) for label, _, _ in rows), default=0)
    low = min(0.0, *(length for _, length, _ in rows)) if rows else 0.0
    high = max(0.0, *(length for _, length, _ in rows)) if rows else 1.0
    span = (high - low) or 1.0
    scale = (WIDTH - left - 70) / span
    height = TOP + BAR * len(rows) + BOTTOM - 10
    body = [f'<text class="dim" x="{left:.0f}" y="{height - 10}">{html.escape(x)}</text>']
    zero = left + (0.0 - low) * scale
    for i, (label, length, kind) in enumerate(rows):
        at = TOP + BAR * i
        start = zero + min(0.0, length) * scale
        color = f"var(--c{kinds.index(kind) % 4})"
        text = html.escape(label)
        body.append(
            f'<text x="{left - 6:.0f}" y="{at + 11}" text-anchor="end" font-size="11">{text}</text>'
            f'<rect x="{start:.1f}" y="{at + 2}" width="{abs(length) * scale:.1f}" '
            f'height="{BAR - 5}" style="fill:{color}"><title>{text}: {_figure(length)} '
            f"{html.escape(kind)}</title></rect>"
            f'<text class="dim" x="{start + abs(length) * scale + 5:.1f}" y="{at + 11}" '
            f'font-size="11">{_figure(length)}</text>'
        )
    return _svg(body + _legend(kinds), height)


class _Axes:
    """Where numbers are on the page, and the ticks."""

    def __init__(self, found: Points, x: str, y: str, log_y: bool):
        finite = [(a, b) for a, b in found if b > 0] if log_y else list(found)
        finite = finite or [(0.0, 1.0)]
        self.log = log_y
        self.labels = x, y
        self.ends_x = _widened(*_ends([a for a, _ in finite]))
        heights = [math.log10(b) if log_y else b for _, b in finite]
        low, high = _ends(heights if log_y else [0.0, *heights])
        self.ends_y = _widened(low, high) if log_y else (low, high + 0.05 * (high - low))

    def x(self, a: float) -> float:
        low, high = self.ends_x
        return LEFT + (WIDTH - LEFT - RIGHT) * (a - low) / (high - low)

    def y(self, b: float) -> float:
        low, high = self.ends_y
        b = (math.log10(b) if b > 0 else low) if self.log else b
        b = min(max(b, low), high)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (b - low) / (high - low)

    def drawn(self) -> list[str]:
        x, y = (html.escape(label) for label in self.labels)
        body = []
        for tick in _ticks(*self.ends_x):
            at = self.x(tick)
            body.append(_grid(at, TOP, at, HEIGHT - BOTTOM))
            body.append(_text(at, HEIGHT - BOTTOM + 16, _figure(tick), "middle"))
        for tick in _log_ticks(*self.ends_y) if self.log else _ticks(*self.ends_y):
            at = self.y(tick)
            body.append(_grid(LEFT, at, WIDTH - RIGHT, at))
            body.append(_text(LEFT - 6, at + 4, _figure(tick), "end"))
        body.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, x, "middle"))
        middle = (TOP + HEIGHT - BOTTOM) / 2
        body.append(
            f'<text class="dim" transform="translate(14 {middle:.0f}) rotate(-90)" '
            f'text-anchor="middle">{y}</text>'
        )
        return body


def _ends(found: Sequence[float]) -> tuple[float, float]:
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _widened(low: float, high: float) -> tuple[float, float]:
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends, four to eight of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 8)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    per = (1, 2, 5) if high - low < 3 else (1,)
    found = [m * 10.0**d for d in decades for m in per]
    return [tick for tick in found if low <= math.log10(tick) <= high]


def _figure(number: float) -> str:
    return f"{0.0 if abs(number) < 1e-12 else number:.4g}"


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="dim" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _mark(x: float, y: float, kind: int, tip: str = "") -> str:
    """Round, square, or a diamond, by series."""
    title = f"<title>{html.escape(tip)}</title>" if tip else ""
    fill = f'style="fill:var(--c{kind % 4})"'
    if kind % 3 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {fill}>{title}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if kind % 3 == 2 else ""
    at = f'x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
    return f"<rect {at}{turn} {fill}>{title}</rect>"


def _dot(axes: _Axes, a: float, b: float, kind: int, tip: str) -> str:
    return _mark(axes.x(a), axes.y(b), kind, tip)


def _label(label: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """Beside its point, where there is room; else only the tooltip says it."""
    width = 6.0 * len(label)
    places: tuple[Callable[[], tuple[float, float, str]], ...] = (
        lambda: (x + 8, y + 4, "start"),
        lambda: (x - 8, y + 4, "end"),
        lambda: (x + 4, y - 8, "start"),
        lambda: (x + 4, y + 16, "start"),
    )
    for place in places:
        at, height, anchor = place()
        start = at if anchor == "start" else at - width
        inside = start > LEFT and start + width < WIDTH and TOP < height < HEIGHT - BOTTOM
        free = all(
            start > end or begin > start + width or abs(height - other) > 11
            for begin, end, other in taken
        )
        if inside and free:
            taken.append((start, start + width, height))
            text = html.escape(label)
            return (
                f'<text class="halo" x="{at:.1f}" y="{height:.1f}" text-anchor="{anchor}" '
                f'font-size="10">{text}</text>'
            )
    return ""


def _legend(names: Sequence[str]) -> list[str]:
    if len(names) < 2:
        return []
    body, at = [], float(LEFT)
    for i, name in enumerate(names):
        body.append(_mark(at, 14, i))
        body.append(f'<text x="{at + 10:.0f}" y="18">{html.escape(name)}</text>')
        at += 30 + 6.8 * len(name)
    return body


def _svg(body: Sequence[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    page = f'<rect class="page" width="{WIDTH}" height="{height:.0f}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="fdq-chart" role="img" {size}>'
    return "\n".join([head, f"<style>{STYLE}</style>", page, *body, "</svg>\n"])
