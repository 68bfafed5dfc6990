"""Tables of how large models become, from shapes alone: `fdq.plan` for many models and schemes.

python -m benchmarks.plan_table                        # prints both
python -m benchmarks.plan_table --page docs/schemes.md # puts them between their marks
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any

import fdq
from benchmarks import page
from fdq.analysis.planner import Plan
from fdq.schemes.fastdeploy_config import WINT2_MIX
from fdq.text_table import markdown
from pallas_kernels.aot.gpu_targets import GPUS, SHORT_NAMES

SIZES, CARDS = "plan", "cards"  # the parts of the page
CONTEXT = 8192
ROOM = 0.9
"""Of a card's memory, what weights and cache may take: programs and their temporaries need some."""

_SMALL, _LARGE = "ernie-4.5-21b-a3b", "ernie-4.5-300b-a47b"
_GROUPS = (
    ("attention",),
    ("dense mlp",),
    ("routed experts",),
    ("embeddings", "router", "norms"),
)
_METHODS: tuple[tuple[str, Any, str | None], ...] = (
    ("none (bf16)", "W16A16C16", None),
    ("WINT8", "WINT8", None),
    ("WINT4", "WINT4", None),
    ('WINT4, `compat="fastdeploy"`', "WINT4", "fastdeploy"),
    ("block_wise_fp8", "block_wise_fp8", None),
    ("WINT2 (all linear layers)", "WINT2", None),
    ("mix_quant", "mix_quant", None),
    ("FastDeploy's WINT2 mix", WINT2_MIX, None),
)
LADDER = ("W16A16C16", "W8A16C8", "W4A16C8", "WT3A16C8", "WT2A16C8")
"""From the best of quality to the least bytes."""
MODELS = (
    "qwen3-0.6b", "llama-3.2-1b", "gemma-3-4b", "llama-3.1-8b", "qwen3-8b", "ernie-4.5-21b-a3b",
    "gemma-3-27b", "qwen3-30b-a3b", "qwen3-32b", "ernie-4.5-300b-a47b",
)  # fmt: skip


def sizes() -> str:
    """Weights of both large ERNIEs by method, and of the larger one by kind of layer."""
    lines = []
    for name, scheme, compat in _METHODS:
        large = fdq.plan(_LARGE, scheme, compat=compat)
        # The mixture speaks of layers that the smaller model does not have.
        of_small = isinstance(scheme, str)
        small = f"{_gigabytes(_SMALL, scheme, compat):.2f}" if of_small else "—"
        cells = [f"{large.weights.bytes / 1e9:.1f}"]
        for kinds in _GROUPS:
            held = sum(size for kind, _, size, _ in large.rows() if kind in kinds) / 1e9
            cells.append(f"{held:.1f}" if kinds == ("routed experts",) else f"{held:.2f}")
        lines.append((name, small, *cells))
    head = ["scheme", "21B-A3B, GB", "300B-A47B, GB", "attention", "dense MLP", "routed experts"]
    return markdown([*head, "embeddings, router, norms"], lines)


def _gigabytes(model: str, scheme: Any, compat: str | None) -> float:
    return fdq.plan(model, scheme, compat=compat).weights.bytes / 1e9


@functools.cache
def _plan(model: str, scheme: str) -> Plan:
    return fdq.plan(model, scheme, context=CONTEXT)


def cell(model: str, memory: int) -> str:
    """The first scheme of the ladder that fits into the memory, with its gigabytes."""
    for scheme in LADDER:
        total = _plan(model, scheme).total_bytes
        if total <= ROOM * memory:
            name = "bf16" if scheme == LADDER[0] else scheme
            return f"{name} {total / 1e9:.1f}"
    return "—"


def cards() -> str:
    """Models by cards: the first scheme of the ladder that fits, and gigabytes with the cache."""
    gpus = sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes)
    head = [f"{SHORT_NAMES[gpu.name]}, {gpu.memory_bytes / 1e9:.0f} GB" for gpu in gpus]
    lines = [(model, *(cell(model, gpu.memory_bytes) for gpu in gpus)) for model in MODELS]
    return markdown(["model", *head], lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables, or writes them to a page with marks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--page", type=pathlib.Path, metavar="FILE", help="write them there")
    arguments = parser.parse_args(argv)
    for part, make in ((CARDS, cards), (SIZES, sizes)):
        made = make()
        if arguments.page is None:
            print(f"{made}\n")
            continue
        try:
            page.fill(arguments.page, part, made)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
