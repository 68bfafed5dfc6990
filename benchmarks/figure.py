"""Figures of the benchmarks; matplotlib comes with the extra `plots`."""

from __future__ import annotations

from typing import Any


def dot_chart(labels: list[str], label: str, *, width: float = 9.0) -> tuple[Any, Any]:
    """A figure with one line a label, the first on top, and its axes.

    Args:
      labels: of the lines, at ``y = 0, 1, ...``.
      label: of the horizontal axis.
      width: in inches; the height follows from the number of lines.

    Raises:
      SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f"--plot needs matplotlib (pip install matplotlib): {error}") from error
    figure = Figure(figsize=(width, 0.8 + 0.22 * len(labels)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure, axes
