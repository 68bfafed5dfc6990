"""Pictures as SVG text, for files and for HTML: all of fdq's are made here, without a library.

Colors follow the reader's, light or dark (`prefers-color-scheme`), on a ground of their own. They
are classes of a style sheet within the picture, since an `<img>` has no style but its own.
"""

import dataclasses
from collections.abc import Sequence
from html import escape

COLORS = 8
"""Colors of series are 0 to 7, the last one grey; beyond, they begin anew."""
GREY = COLORS - 1

_SCOPE = ".fdq-picture"  # inside HTML the style sheet would else hold for all of it
_LIGHT = {
    "page": "#ffffff", "ink": "#24292f", "dim": "#57606a", "grid": "#d0d7de",
    "series": (
        "#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#0c7d85", "#9a6700", "#8c959f",
    ),
    "tints": ("#ddf0ff", "#fff1c2", "#dcf5d9", "#f6f8fa"),
}  # fmt: skip
_DARK = {
    "page": "#0d1117", "ink": "#e6edf3", "dim": "#9198a1", "grid": "#3d444d",
    "series": (
        "#58a6ff", "#ffa657", "#56d364", "#d2a8ff", "#ff80b5", "#4cc9d0", "#e3b341", "#7d8590",
    ),
    "tints": ("#10304d", "#3b2e05", "#12351c", "#1c2128"),
}  # fmt: skip
_DASHES = ("", "6 4", "2 3", "8 3 2 3")
_MONO = "ui-monospace,Menlo,Consolas,monospace"


def _colors(of: dict) -> str:
    rules = {
        ".page": f"fill:{of['page']}",
        "text": f"fill:{of['ink']}",
        ".dim": f"fill:{of['dim']}",
        ".grid": f"stroke:{of['grid']}",
        ".halo": f"stroke:{of['page']}",
        ".edge": f"stroke:{of['dim']}",
        **{f".f{i}": f"fill:{color}" for i, color in enumerate(of["series"])},
        **{f".s{i}": f"stroke:{color}" for i, color in enumerate(of["series"])},
        **{f".t{i}": f"fill:{color}" for i, color in enumerate(of["tints"])},
    }
    return "\n".join(f"{_SCOPE} {one}{{{rule}}}" for one, rule in rules.items())


STYLE = f"""
{_SCOPE}{{font:12px system-ui,Helvetica,Arial,sans-serif}}
{_SCOPE} .line{{fill:none;stroke-width:2}}
{_SCOPE} .halo{{paint-order:stroke;stroke-width:3px}}
{_SCOPE} .edge{{fill:none;stroke-width:1.3}}
{_colors(_LIGHT)}
@media (prefers-color-scheme:dark){{
{_colors(_DARK)}
}}
"""
_HEAD = (
    '<defs><marker id="fdq-head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
    'markerHeight="7" orient="auto"><path class="dim" d="M0,0 L10,5 L0,10 z"/></marker></defs>'
)


@dataclasses.dataclass
class Picture:
    """Shapes, one over the other; places and sizes are in pixels.

    Series differ by dash and by shape as well as by color. A `title` is shown by a browser when the
    pointer rests on the shape.

    Attributes:
      width: of the picture.
      parts: what was drawn so far, as SVG.
    """

    width: int
    parts: list[str] = dataclasses.field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        anchor: str = "start",
        size: int = 12,
        dim: bool = False,
        bold: bool = False,
        mono: bool = False,
        halo: bool = False,
        upwards: bool = False,
    ) -> None:
        """A line of text whose base is at `y`; `anchor` is `start`, `middle` or `end`.

        `halo` keeps it readable on lines; `upwards` turns it by a quarter.
        """
        names = " ".join(name for name, on in (("dim", dim), ("halo", halo)) if on)
        place = f'x="{x:.1f}" y="{y:.1f}"'
        if upwards:
            place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"'
        said = [
            f'class="{names}"' if names else "",
            place,
            f'text-anchor="{anchor}"' if anchor != "start" else "",
            f'font-size="{size}"' if size != 12 else "",
            'font-weight="bold"' if bold else "",
            f'font-family="{_MONO}"' if mono else "",
        ]
        self.parts.append(f"<text {' '.join(filter(None, said))}>{escape(content)}</text>")

    def bar(
        self, x: float, y: float, width: float, height: float, color: int, title: str = ""
    ) -> None:
        """A filled rectangle."""
        size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self._shape("rect", f'class="f{color % COLORS}" {size}', title)

    def mark(self, x: float, y: float, series: int, title: str = "") -> None:
        """A disc, a square or a diamond in the color of a series."""
        fill = f'class="f{series % COLORS}"'
        if series % 3 == 0:
            self._shape("circle", f'{fill} cx="{x:.1f}" cy="{y:.1f}" r="4.5"', title)
            return
        turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if series % 3 == 2 else ""
        size = f'x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
        self._shape("rect", f"{fill} {size}{turn}", title)

    def line(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A faint line, as of a grid."""
        ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
        self.parts.append(f'<line class="grid" {ends}/>')

    def curve(self, points: Sequence[tuple[float, float]], series: int | None = None) -> None:
        """A line through points: that of a series, or a dotted grey one."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        color = GREY if series is None else series % COLORS
        dash = "3 4" if series is None else _DASHES[series % len(_DASHES)]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline class="line s{color}" points="{path}"{dashed}/>')

    def box(self, x: float, y: float, width: float, height: float, tint: int) -> None:
        """A frame with rounded corners around something that is named in it; tints are 0 to 3."""
        size = f'x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}"'
        # The edge's class says `fill:none`: the tint stands after it in the style sheet.
        self.parts.append(f'<rect class="edge box t{tint}" {size} rx="7"/>')

    def arrow(self, path: str) -> None:
        """An arrow along a path in SVG's own notation."""
        self.parts.append(f'<path class="edge" d="{path}" marker-end="url(#fdq-head)"/>')

    def legend(
        self, names: Sequence[str], x: float, y: float, *, bars: Sequence[int] = ()
    ) -> float:
        """Names beside the marks of their series, or beside squares in the colors of `bars`.

        It goes on in a new line where the picture ends; what is returned is the base of the last.
        """
        at = x
        for series, name in enumerate(names):
            width = 30 + 7.2 * len(name)
            if at > x and at + width > self.width:
                at, y = x, y + 18
            if bars:
                self.bar(at - 5, y - 9, 10, 10, bars[series])
            else:
                self.mark(at, y - 4, series)
            self.text(at + 10, y, name)
            at += width
        return y

    def _shape(self, name: str, attributes: str, title: str) -> None:
        inside = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f"<{name} {attributes}>{inside}</{name}>")

    def svg(self, height: float, label: str) -> str:
        """The whole picture; `label` says to who does not see it what is shown."""
        size = f'width="{self.width}" height="{height:.0f}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="{_SCOPE[1:]}" role="img" '
            f'aria-label="{escape(label)}" viewBox="0 0 {self.width} {height:.0f}" {size}>'
        )
        arrows = [_HEAD] if any("#fdq-head" in part for part in self.parts) else []
        page = f'<rect class="page" {size}/>'
        return "\n".join([head, f"<style>{STYLE}</style>", *arrows, page, *self.parts, "</svg>\n"])
