"""Writes the table of docs/several_devices.md: large models on devices that nobody needs to have.

    python -m docs.memory_report
    python -m docs.memory_report --compile

Everything is computed from shapes, as `fdq plan --mesh --gpu` does it. With `--compile` the decode
steps are compiled ahead of time for those GPUs, all layers of them, as `fdq kernels --decode-step`
does it (extra `aot`; four minutes), and what the compiler says is written down, too.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import page
from fdq.analysis import decode_step
from fdq.analysis.device_plan import DevicePlan, Sharded, of_sharded
from fdq.schemes.fastdeploy_config import WINT2_MIX
from fdq.schemes.mesh_rules import abstract_mesh
from fdq.text_table import markdown, size

PAGE = pathlib.Path(__file__).with_name("several_devices.md")
REPORT = pathlib.Path(__file__).with_name("several_devices.json")
COMPILED = PAGE.with_name("several_devices_compiled.json")
PART, PART_COMPILED = "memory", "compiled"

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


def steps() -> list[dict[str, Any]]:
    """The decode step of each case, compiled: bytes of a device and what is launched."""
    found = []
    for model, name, scheme, mesh, gpu, context, batch in CASES:
        print(f"{model} {name} for {math.prod(mesh.values())} {gpu}", flush=True)
        sizes = {"context": context, "batch": batch}
        several = mesh if math.prod(mesh.values()) > 1 else None
        report = decode_step.report(model, scheme, gpu, mesh=several, **sizes)
        if not report.ok:
            raise RuntimeError(f"{model} {name}: {report.error}")
        same = ("jax", "gpu", "layers", "mesh", "context", "batch", "launches", "launch_kinds")
        same += ("temp_bytes", "alias_bytes", "weight_copies", "unknown_loops", "seconds")
        held = report.weight_bytes + report.cache_bytes
        values = {key: getattr(report, key) for key in same}
        found.append({"model": model, "scheme": name, "argument_bytes": held, **values})
    return found


def compiled_table(steps: Sequence[dict[str, Any]], plans: Sequence[DevicePlan]) -> str:
    """Beside the plans, in Markdown."""
    columns = ["model", "devices", "arguments", "as planned", "temp.", "launches", "sums"]
    rows = []
    for step, plan in zip(steps, plans, strict=True):
        planned = plan.weight_bytes + plan.cache_bytes
        rows.append(
            (
                f"{step['model']} {step['scheme']}",
                f"{math.prod(plan.mesh.values())} {step['gpu'].upper()}",
                size(step["argument_bytes"]),
                f"{step['argument_bytes'] / planned - 1:+.2%}",
                size(step["temp_bytes"]),
                f"{step['launches']:,}",
                str(step["launch_kinds"].get("AllReduce", 0)),
            )
        )
    return markdown(columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and, with every figure, the JSON beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:  python -m docs.memory_report --compile",
    )
    parser.add_argument("--compile", action="store_true", help="compile the steps, too")
    compile_too = parser.parse_args(arguments).compile
    made = plans()
    page.fill(PAGE, PART, table(made))
    REPORT.write_text(json.dumps([plan.to_dict() for plan in made], indent=1) + "\n", "utf-8")
    if compile_too:
        found = steps()
        page.fill(PAGE, PART_COMPILED, compiled_table(found, made))
        COMPILED.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
