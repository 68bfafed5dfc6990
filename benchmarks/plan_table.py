"""Tables of how large models become, from shapes alone: `fdq.plan` for many models and schemes.

python -m benchmarks.plan_table                        # prints both
python -m benchmarks.plan_table --page docs/schemes.md # puts them between their marks
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import fdq
from benchmarks import page
from fdq.analysis.planner import Plan
from fdq.text_table import markdown
from pallas_kernels.aot.gpu_targets import GPUS

SIZES, CARDS = "plan", "cards"  # the parts of the page
CONTEXT = 8192
ROOM = 0.9
"""Of a card's memory, what weights and cache may take: programs and their temporaries need some."""

FASTDEPLOY_WINT2: Mapping[str, Any] = {
    "quantization": "wint2",
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4",
            "quant_granularity": "per_channel",
            "quant_start_layer": 0,
            "quant_end_layer": 6,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2",
            "quant_granularity": "pp_acc",
            "quant_group_size": 64,
            "quant_start_layer": 7,
            "quant_end_layer": 53,
        },
    },
}
"""FastDeploy's own mixture for ERNIE-4.5-300B-A47B (its docs/quantization/wint2.md)."""

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
    ("FastDeploy's WINT2 mix", FASTDEPLOY_WINT2, None),
)
LADDER = ("W16A16C16", "W8A16C8", "W4A16C8", "WT3A16C8", "WT2A16C8")
"""From the best of quality to the least bytes."""
MODELS = (
    "qwen3-0.6b", "llama-3.2-1b", "gemma-3-4b", "llama-3.1-8b", "qwen3-8b", "ernie-4.5-21b-a3b",
    "gemma-3-27b", "qwen3-30b-a3b", "qwen3-32b", "ernie-4.5-300b-a47b",
)  # fmt: skip
_CARDS = {
    "t4": "T4", "l4": "L4", "a100": "A100", "h100": "H100", "rtx_pro_6000": "RTX PRO 6000",
    "h200": "H200", "b200": "B200",
}  # fmt: skip


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
    gpus = [GPUS[name] for name in _CARDS]
    head = [f"{_CARDS[gpu.name]}, {gpu.memory_bytes / 1e9:.0f} GB" for gpu in gpus]
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
