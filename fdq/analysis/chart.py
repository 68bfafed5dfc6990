"""Charts as SVG text (`fdq.analysis.svg`): lines, points and bars, with their axes and ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fdq.analysis.svg import Picture

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 30, 46
BAR = 17  # a row of a bar chart
_FEW = 40  # points of a line that are marked
Points = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = True,
) -> str:
    """A line for each series, by name; `x` and `y` label the axes.

    Points that are not finite are left out, here and below, and from a logarithmic axis those that
    are not positive. A linear `y` begins at zero unless `from_zero` is False.
    """
    series = {
        name: [(a, b) for a, b in points if _shown(a, log_x) and _shown(b, log_y)]
        for name, points in series.items()
    }
    picture = Picture(WIDTH)
    low = _legend(picture, list(series))
    whole = [point for points in series.values() for point in points]
    axes = _Axes(whole, log_x, log_y, from_zero, top=low)
    axes.draw(picture, x, y)
    for i, (name, points) in enumerate(series.items()):
        picture.curve([(axes.x(a), axes.y(b)) for a, b in points], i)
        for a, b in points if len(points) <= _FEW else ():
            picture.mark(axes.x(a), axes.y(b), i, f"{name}: {_figure(a)}, {_figure(b)}")
    return picture.svg(axes.height, f"{y} by {x}: {', '.join(series)}")


def points(
    groups: Mapping[str, Sequence[tuple[str, float, float]]], *, x: str, y: str, log_y: bool = False
) -> str:
    """Labelled points `(label, x, y)` in groups, and a line along those that no other beats.

    The first group is drawn on top. Beaten is a point where another has no larger x and a smaller
    y, in all groups. Where `log_y`, points that are not positive stand on the lower edge.
    """
    groups = {
        name: [(label, a, b) for label, a, b in members if math.isfinite(a) and math.isfinite(b)]
        for name, members in groups.items()
    }
    picture = Picture(WIDTH)
    low = _legend(picture, list(groups))
    whole = [(a, b) for members in groups.values() for _, a, b in members]
    axes = _Axes(whole, False, log_y, True, top=low)
    axes.draw(picture, x, y)
    picture.curve([(axes.x(a), axes.y(b)) for a, b in pareto(whole)])
    taken: list[tuple[float, float, float]] = []
    for members in groups.values():
        for label, a, b in members:
            _label(picture, axes, label, axes.x(a), axes.y(b), taken)
    for i, (name, members) in reversed(list(enumerate(groups.items()))):
        for label, a, b in members:
            tip = f"{label} ({name}): {_figure(a)}, {_figure(b)}"
            picture.mark(axes.x(a), axes.y(b), i, tip)
    return picture.svg(axes.height, f"{y} by {x}")


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
    picture = Picture(WIDTH)
    top = _legend(picture, kinds, range(len(kinds)))
    height = top + BAR * len(rows) + BOTTOM - 10
    picture.text(left, height - 10, x, dim=True)
    zero = left + (0.0 - low) * scale
    for i, (label, length, kind) in enumerate(rows):
        at = top + BAR * i
        start, wide = zero + min(0.0, length) * scale, abs(length) * scale
        picture.text(left - 6, at + 11, label, anchor="end", size=11)
        tip = f"{label}: {_figure(length)} {kind}"
        picture.bar(start, at + 2, wide, BAR - 5, kinds.index(kind), tip)
        picture.text(start + wide + 5, at + 11, _figure(length), dim=True, size=11)
    return picture.svg(height, x)


class _Axes:
    """Where numbers are on the page, and the ticks."""

    def __init__(self, found: Points, log_x: bool, log_y: bool, from_zero: bool, *, top: float):
        found = [(a, b) for a, b in found if _shown(a, log_x) and _shown(b, log_y)] or [(1.0, 1.0)]
        self.log_x, self.log_y = log_x, log_y
        self.top, self.height = top, HEIGHT + top - TOP
        self.ends_x = _widened(*_ends([_scaled(a, log_x) for a, _ in found]))
        heights = [_scaled(b, log_y) for _, b in found]
        if log_y or not from_zero:
            self.ends_y = _widened(*_ends(heights))
        else:
            low, high = _ends([0.0, *heights])
            self.ends_y = low, high + 0.05 * (high - low)

    def x(self, a: float) -> float:
        low, high = self.ends_x
        return LEFT + (WIDTH - LEFT - RIGHT) * (_scaled(a, self.log_x) - low) / (high - low)

    def y(self, b: float) -> float:
        low, high = self.ends_y
        b = low if self.log_y and b <= 0 else _scaled(b, self.log_y)
        b = min(max(b, low), high)
        return self.height - BOTTOM - (self.height - self.top - BOTTOM) * (b - low) / (high - low)

    def draw(self, picture: Picture, x: str, y: str) -> None:
        bottom = self.height - BOTTOM
        for tick in _ticks(*self.ends_x, self.log_x):
            at = self.x(tick)
            picture.line(at, self.top, at, bottom)
            picture.text(at, bottom + 16, _figure(tick), anchor="middle", dim=True)
        for tick in _ticks(*self.ends_y, self.log_y):
            at = self.y(tick)
            picture.line(LEFT, at, WIDTH - RIGHT, at)
            picture.text(LEFT - 6, at + 4, _figure(tick), anchor="end", dim=True)
        across = (LEFT + WIDTH) / 2
        picture.text(across, self.height - 8, x, anchor="middle", dim=True)
        picture.text(14, (self.top + bottom) / 2, y, anchor="middle", dim=True, upwards=True)


def _shown(number: float, log: bool) -> bool:
    return math.isfinite(number) and (number > 0 or not log)


def _scaled(number: float, log: bool) -> float:
    return math.log10(number) if log else number


def _ends(found: Sequence[float]) -> tuple[float, float]:
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _widened(low: float, high: float) -> tuple[float, float]:
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between the ends, four to eight of them; of powers of ten, where `log`."""
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        per = (1, 2, 5) if high - low < 3 else (1,)
        found = [m * 10.0**d for d in decades for m in per]
        return [tick for tick in found if low <= math.log10(tick) <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 8)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(number: float) -> str:
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{0.0 if abs(number) < 1e-12 else number:.4g}"


def _label(
    picture: Picture,
    axes: _Axes,
    label: str,
    x: float,
    y: float,
    taken: list[tuple[float, float, float]],
) -> None:
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
        across = start > LEFT and start + width < WIDTH
        inside = across and axes.top < height < axes.height - BOTTOM
        free = all(
            start > end or begin > start + width or abs(height - other) > 11
            for begin, end, other in taken
        )
        if inside and free:
            taken.append((start, start + width, height))
            picture.text(at, height, label, anchor=anchor, size=10, halo=True)
            return


def _legend(picture: Picture, names: Sequence[str], bars: Sequence[int] = ()) -> float:
    """Where what is below it begins; one name needs none."""
    if len(names) < 2:
        return TOP
    return picture.legend(names, LEFT, 18, bars=bars) + TOP - 18
