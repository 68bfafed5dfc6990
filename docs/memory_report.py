"""Writes the table of docs/several_devices.md: large models on devices that nobody needs to have.

    python -m docs.memory_report

Everything is computed from shapes, as `fdq plan --mesh --gpu` does it.
"""

import json
import math
import pathlib
from collections.abc import Sequence

from benchmarks import page
from fdq.analysis.device_plan import DevicePlan, Sharded, of_sharded
from fdq.schemes.fastdeploy_config import WINT2_MIX
from fdq.schemes.mesh_rules import abstract_mesh
from fdq.text_table import markdown, size

PAGE = pathlib.Path(__file__).with_name("several_devices.md")
REPORT = pathlib.Path(__file__).with_name("several_devices.json")
PART = "memory"

CASES = (
    ("ernie-4.5-300b-a47b", "W4A8C8", "W4A8C8", {"tensor": 8}, "h100", 131072, 16),
    ("ernie-4.5-300b-a47b", "W4A8C8", "W4A8C8", {"tensor": 4}, "h200", 131072, 8),
    ("ernie-4.5-300b-a47b", "WINT2", WINT2_MIX, {"tensor": 1}, "h200", 32768, 1),
    ("ernie-4.5-21b-a3b", "W4A16C8", "W4A16C8", {"tensor": 2}, "l4", 32768, 4),
)
"""Model, what its scheme is called, the scheme, the mesh, the GPU, tokens and sequences."""


def plans() -> list[DevicePlan]:
    """The plan of each case."""
    found = []
    for model, _, scheme, mesh, gpu, context, batch in CASES:
        sharded = Sharded.of(model, scheme, abstract_mesh(mesh))
        found.append(of_sharded(sharded, gpu=gpu, context=context, batch=batch))
    return found


def table(plans: Sequence[DevicePlan]) -> str:
    """Of each device, in Markdown."""
    columns = ["model", "devices", "sequences", "weights", "cache", "temp.", "all of", "tokens/s",
               "at most"]  # fmt: skip
    rows = []
    for (model, name, *_), plan in zip(CASES, plans, strict=True):
        assert plan.gpu is not None and plan.usable_bytes and plan.tokens_per_second
        held = (plan.weight_bytes, plan.cache_bytes, plan.temporary_bytes)
        rows.append(
            (
                f"{model} {name}",
                f"{math.prod(plan.mesh.values())} {plan.gpu.name.upper()}",
                f"{plan.batch} x {plan.context:,}",
                *map(size, held),
                f"{size(plan.total_bytes)} of {size(plan.usable_bytes)}",
                f"{plan.tokens_per_second:,.0f}" if plan.fits else "too large",
                str(plan.largest_batch),
            )
        )
    return markdown(columns, rows)


def main() -> None:
    """Writes the page and, with every figure, the JSON beside it."""
    made = plans()
    page.fill(PAGE, PART, table(made))
    REPORT.write_text(json.dumps([plan.to_dict() for plan in made], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
