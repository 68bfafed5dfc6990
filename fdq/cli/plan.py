"""`fdq plan`: bytes of a model under a scheme, before anything is loaded."""

import pathlib
from typing import Annotated, Any

import typer

from fdq.cli import console

NAME = "plan"
EXAMPLE = """Examples:

fdq plan ernie-4.5-300b-a47b --scheme WINT4 --context 131072

fdq plan ernie-4.5-300b-a47b --scheme W4A8C8 --mesh tensor=8 --gpu h100 --batch 16"""

Schemes = Annotated[
    list[str],
    typer.Option("--scheme", "-s", help=console.SCHEME_HELP + " Several: a row of a table each."),
]
Mesh = Annotated[
    str | None,
    typer.Option("--mesh", help="Bytes of each device: tensor=8. They need not be there."),
]
Gpus = Annotated[
    list[str] | None,
    typer.Option("--gpu", help="What fits, and tokens/s at the roofline: h100. Or several."),
]


@console.command
def run(
    model: Annotated[
        str, typer.Argument(help="Name of a known model, or a directory with a config.json.")
    ],
    scheme: Schemes,
    context: Annotated[int, typer.Option(help="Tokens in the cache of each sequence.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    mesh: Mesh = None,
    gpu: Gpus = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Ask the compiler what is held for a moment; minutes."),
    ] = False,
    plot: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE.svg", help="Draw tokens/s against the batch, as far as it fits."
        ),
    ] = None,
    compat: console.Compat = None,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Bytes by kind of layer and of the cache, or of each device, from shapes alone."""
    known = pathlib.Path(model) if pathlib.Path(model).is_dir() else model
    schemes = [console.read_scheme(name) for name in scheme]
    if mesh is None and not gpu and not compiled and plot is None and len(schemes) == 1:
        _one(known, schemes[0], context, batch, compat, json)
        return
    if plot is not None and not gpu:
        raise ValueError("--plot draws the speed of a GPU: name one, as in --gpu h100.")
    console.writable("--plot", plot, ".svg")
    _devices(known, schemes, context, batch, mesh, gpu or [None], compiled, plot, compat, json)


def _one(known: Any, recipe: Any, context: int, batch: int, compat: Any, json: bool) -> None:
    from fdq.analysis.planner import plan

    with console.err.status("Quantizing shapes ..."):
        result = plan(known, recipe, context=context, batch=batch, compat=compat)
    if json:
        console.print_json(result.to_dict())
        return
    columns = ["kind", "parameters", "size", "bits/weight", "formats"]
    title = f"{result.model} in {result.scheme}"
    console.out.print(console.table(title, columns, result.lines(console.size)))
    _remarks(result.remarks)


def _devices(
    known: Any,
    schemes: list[Any],
    context: int,
    batch: int,
    mesh: str | None,
    gpus: list[Any],
    compiled: bool,
    plot: pathlib.Path | None,
    compat: str | None,
    json: bool,
) -> None:
    from fdq.analysis import compiled_plan, device_plan, plan_plot
    from fdq.schemes.mesh_rules import abstract_mesh, parse_sizes
    from pallas_kernels.aot.gpu_targets import find

    gpus = [None if name is None else find(name).name for name in gpus]
    sizes = device_plan.ONE_DEVICE if mesh is None else parse_sizes(mesh)
    plans, found, curves = [], [], []
    for scheme in schemes:
        with console.err.status("Quantizing and cutting shapes ..."):
            where = abstract_mesh(sizes)
            sharded = device_plan.Sharded.of(known, scheme, where, compat=compat)
        held = None
        if compiled:
            with console.err.status("Compiling a layer of each kind ..."):
                settings = {"mesh": sizes, "context": context, "batch": batch, "compat": compat}
                room = [None if gpu is None else device_plan.usable_bytes(gpu) for gpu in gpus]
                settings["chunk"] = max(sharded.chunk(batch, context, most) for most in room)
                found.append(compiled_plan.compiled(known, scheme, **settings))
                held = max(found[-1].step_bytes, found[-1].prompt_bytes)
        for gpu in gpus:
            settings = {"gpu": gpu, "context": context, "batch": batch, "temporary_bytes": held}
            plans.append(device_plan.of_sharded(sharded, **settings))
            if plot is not None:
                curves.append(plan_plot.curve(sharded, plans[-1]))
    if plot is not None:
        plot.write_text(plan_plot.draw(curves), "utf-8")
    if json:
        console.print_json({"plans": [one.to_dict() for one in plans],
                            "compiled": [vars(one) for one in found]})  # fmt: skip
        return
    axes = ", ".join(f"{name}={size}" for name, size in sizes.items())
    title = f"{plans[0].model}, each device of {axes}: {batch} x {context:,} tokens"
    room = {p.gpu.name: console.size(p.usable_bytes or 0) for p in plans if p.gpu is not None}
    if room:
        title += f" (may take: {', '.join(f'{gpu} {size}' for gpu, size in room.items())})"
    rows = [plan.cells() for plan in plans]
    columns: list[str] = list(device_plan.COLUMNS)
    if gpus == [None]:
        columns, rows = columns[1:6], [row[1:6] for row in rows]
    table = console.table(title, columns, rows)
    table.collapse_padding, table.pad_edge = True, False  # or it would not fit into 80 columns
    console.out.print(table)
    if len(plans) == 1 and plans[0].gpu is not None:
        console.out.print(plans[0].spent(), markup=False, soft_wrap=True)
    for one in found:
        share = one.argument_bytes / one.planned_bytes
        console.out.print(
            f"compiled, {one.layers} layers: {share:.2%} of the weights and cache planned for "
            f"them; for a moment {console.size(one.step_bytes)} in a step, "
            f"{console.size(one.prompt_bytes)} with prompts",
            markup=False,
            soft_wrap=True,
        )
    _remarks(tuple(dict.fromkeys(remark for plan in plans for remark in plan.remarks)))


def _remarks(remarks: tuple[str, ...]) -> None:
    for remark in remarks:
        console.err.print(remark, style="yellow", markup=False, soft_wrap=True)
