"""Draws `docs/schemes.svg`: what each scheme costs on the shipped model, least bits at the top.

    python -m benchmarks.schemes_picture          # writes the picture
    python -m benchmarks.schemes_picture --check  # fails if it is not what the figures say

The figures are those that `fdq schemes` shows, which `benchmarks.schemes --page` measures.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

from benchmarks.schemes import MEASURED
from fdq.analysis.svg import Picture

PICTURE = pathlib.Path(__file__).parent.parent / "docs" / "schemes.svg"
_ROW, _TOP, _LEFT, _WIDE = 17, 46, 250, 500
_FROM, _TO = 1e-4, 1.0
"""The logarithmic axis, in nats per token."""


def drawing(rows: list[dict[str, Any]]) -> str:
    """The picture as SVG; `rows` are those of `MEASURED`, the original first."""
    rows = sorted(rows[1:], key=lambda row: row["kl_nats_per_token"])
    picture = Picture(_LEFT + _WIDE + 90)
    bottom = _TOP + _ROW * len(rows)
    picture.text(10, 18, "KL to the original, nats per token, through the KV cache", bold=True)
    for power in range(round(math.log10(_FROM)), round(math.log10(_TO)) + 1):
        x = _place(10.0**power)
        picture.line(x, _TOP - 4, x, bottom)
        picture.text(x, _TOP - 9, f"{10.0**power:g}", anchor="middle", dim=True)
    for index, row in enumerate(rows):
        base = _TOP + _ROW * index + 12
        bits, kl = row["quantized_bits_per_weight"], row["kl_nats_per_token"]
        picture.text(10, base, row["scheme"])
        picture.text(_LEFT - 14, base, f"{bits or 16:.2f} bits", anchor="end", dim=True)
        x = _place(kl)
        picture.line(_LEFT, base - 4, x, base - 4)
        picture.mark(x, base - 4, _series(bits), f"{row['scheme']}: {kl:.5f} nats per token")
        picture.text(x + 9, base, f"{kl:.4f}", dim=True, halo=True)
    return picture.svg(bottom + 8, "KL to the original by scheme")


def _place(kl: float) -> float:
    share = math.log(max(kl, _FROM) / _FROM) / math.log(_TO / _FROM)
    return _LEFT + _WIDE * min(share, 1.0)


def _series(bits: float | None) -> int:
    """By bits a weight: 16, 8, 4 and fewer."""
    return 0 if bits is None else 1 if bits > 6 else 2 if bits > 4 else 3


def main(arguments: list[str]) -> None:
    """Writes the picture, or with `--check` compares it with the one that is there."""
    made = drawing(json.loads(MEASURED.read_text("utf-8"))["rows"])
    if arguments == ["--check"]:
        if not PICTURE.exists() or PICTURE.read_text("utf-8") != made:
            sys.exit(f"{PICTURE.name} is stale. Run python -m benchmarks.schemes_picture.")
    elif arguments:
        sys.exit(__doc__)
    else:
        PICTURE.write_text(made, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
