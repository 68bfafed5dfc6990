"""Small pictures in SVG, of colours that light and dark pages show; no library is needed."""

import dataclasses
from html import escape

GREY, FAINT = "#7d8590", "#7d859055"  # readable on white and on black
COLORS = (
    "#4c8dd6", "#d68a3a", "#3aa676", "#8d6fd1", "#c94f7c", "#4fb0b0", "#b0a04a", "#9a9fa6",
)  # fmt: skip


@dataclasses.dataclass
class Picture:
    """Shapes on a ground that stays transparent; places and sizes are in pixels.

    Attributes:
      width: of the picture.
      parts: what was drawn so far, as SVG.
    """

    width: int
    parts: list[str] = dataclasses.field(default_factory=list)

    def text(
        self, x: float, y: float, content: str, *, anchor: str = "start", bold: bool = False
    ) -> None:
        """A line of text whose base is at `y`; `anchor` is `start`, `middle` or `end`."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(content)}</text>'
        )

    def bar(
        self, x: float, y: float, width: float, height: float, color: str, title: str = ""
    ) -> None:
        """A rectangle; `title` is shown by a browser when the pointer rests on it."""
        self._shape(
            f'rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"', color, title
        )

    def dot(self, x: float, y: float, radius: float, color: str, title: str = "") -> None:
        """A filled circle around (x, y)."""
        self._shape(f'circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"', color, title)

    def line(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A faint line, as of a grid."""
        self.parts.append(
            f'<path d="M{x:.1f},{y:.1f} L{to_x:.1f},{to_y:.1f}" stroke="{FAINT}" fill="none"/>'
        )

    def _shape(self, shape: str, color: str, title: str) -> None:
        if not title:
            self.parts.append(f'<{shape} fill="{color}"/>')
            return
        name, inside = shape.split()[0], f"<title>{escape(title)}</title>"
        self.parts.append(f'<{shape} fill="{color}">{inside}</{name}>')

    def svg(self, height: float, label: str) -> str:
        """The whole picture; `label` says to who does not see it what is shown."""
        parts = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height:.0f}" '
            f'width="{self.width}" height="{height:.0f}" font-family="Helvetica, Arial, '
            f'sans-serif" font-size="12" fill="{GREY}" role="img" aria-label="{escape(label)}">\n'
            f"{parts}\n</svg>\n"
        )
