"""A picture of a checkpoint, a line a layer: bytes by kind, bits per weight, relative error."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from fdq.analysis.planner import KINDS, kind_of
from fdq.analysis.svg import GREY, Picture
from fdq.text_table import size

_ROW, _BAR, _TOP = 17, 11, 64
_BYTES, _BITS, _ERROR = (170, 300), (560, 90), (740, 90)  # left edge and width of each column
_COLOR = {kind: min(index, GREY) for index, kind in enumerate(KINDS)}
MOST_LAYERS = 1000


class Tensor(Protocol):
    """What is known of a tensor, as `fdq_checkpoints.inspect` says it."""

    @property
    def path(self) -> str:
        """Dotted."""
        ...

    @property
    def nbytes(self) -> int:
        """Stored."""
        ...

    @property
    def size(self) -> int:
        """Weights that it stands for."""
        ...


def layer_of(path: str) -> str:
    """The layer of a dotted path: up to its first number, or its first part."""
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path)
    return numbered[0] if numbered else path.split(".")[0]


def layer_chart(
    title: str,
    tensors: Iterable[Tensor],
    errors: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """The picture as SVG.

    Args:
      title: the line above.
      tensors: of the checkpoint, in its order.
      errors: by path of a quantized tensor, the sums of squares of its error and of the original;
        a layer's is the square root of the ratio of its sums.

    Raises:
      ValueError: nothing to draw, or more than `MOST_LAYERS` layers.
    """
    layers: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        layers.setdefault(layer_of(tensor.path), []).append(tensor)
    if not layers or len(layers) > MOST_LAYERS:
        raise ValueError(f"a picture has 1 to {MOST_LAYERS} layers, this would have {len(layers)}.")
    held = {name: sum(t.nbytes for t in group) for name, group in layers.items()}
    bits = {
        name: 8 * held[name] / max(1, sum(t.size for t in group)) for name, group in layers.items()
    }
    wrong = {name: _error(group, errors or {}) for name, group in layers.items()}
    known = [
        kind for kind in KINDS if any(kind_of(t.path) == kind for g in layers.values() for t in g)
    ]
    picture = Picture(_ERROR[0] + _ERROR[1] + 70 if errors else _BITS[0] + _BITS[1] + 60)
    picture.text(10, 20, title, bold=True)
    picture.legend(known, 15, 41, bars=[_COLOR[kind] for kind in known])
    for (left, _), head in ((_BYTES, "bytes"), (_BITS, "bits per weight"), (_ERROR, "error")):
        if head != "error" or errors:
            said = "relative error (RMS)" if head == "error" else head
            picture.text(left, _TOP - 4, said, dim=True)
    most_bytes, most_bits = max(held.values()), max(bits.values())
    most_wrong = max((e for e in wrong.values() if e is not None), default=0.0)
    for index, (name, group) in enumerate(layers.items()):
        top = _TOP + 4 + index * _ROW
        base = top + _BAR - 1
        picture.text(_BYTES[0] - 8, base, _short(name), anchor="end")
        at = float(_BYTES[0])
        for kind in known:
            part = sum(t.nbytes for t in group if kind_of(t.path) == kind)
            wide = _BYTES[1] * part / max(1, most_bytes)
            if part:
                picture.bar(at, top, wide, _BAR, _COLOR[kind], f"{name}, {kind}: {part:,} bytes")
            at += wide
        picture.text(at + 5, base, size(held[name]), dim=True)
        _figure(picture, _BITS, top, bits[name], most_bits, f"{bits[name]:.2f}")
        error = wrong[name]
        if error is not None:
            _figure(picture, _ERROR, top, error, most_wrong, f"{error:.2%}")
    return picture.svg(_TOP + 10 + len(layers) * _ROW, f"{title}: bytes and bits by layer")


def _figure(
    picture: Picture, column: tuple[int, int], top: float, value: float, most: float, said: str
) -> None:
    wide = column[1] * value / most if most else 0.0
    picture.bar(column[0], top, wide, _BAR, GREY)
    picture.text(column[0] + wide + 5, top + _BAR - 1, said, dim=True)


def _error(group: list[Tensor], errors: Mapping[str, tuple[float, float]]) -> float | None:
    found = [errors[tensor.path] for tensor in group if tensor.path in errors]
    whole = sum(norm for _, norm in found)
    return math.sqrt(sum(error for error, _ in found) / whole) if whole else None


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"
