"""`fdq plan`: bytes of a model under a scheme, before anything is loaded."""

import pathlib
from typing import Annotated

import typer

from fdq.cli import console

NAME = "plan"
EXAMPLE = "Example:  fdq plan ernie-4.5-300b-a47b --scheme WINT4 --context 131072"


@console.command
def run(
    model: Annotated[
        str, typer.Argument(help="Name of a known model, or a directory with a config.json.")
    ],
    scheme: console.Scheme,
    context: Annotated[int, typer.Option(help="Tokens in the cache of each sequence.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    compat: console.Compat = None,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Bytes by kind of layer and of the cache, from shapes alone."""
    from fdq.analysis.planner import plan

    known = pathlib.Path(model) if pathlib.Path(model).is_dir() else model
    recipe = console.read_scheme(scheme)
    with console.err.status("Quantizing shapes ..."):
        result = plan(known, recipe, context=context, batch=batch, compat=compat)
    if json:
        console.print_json(result.to_dict())
        return
    columns = ["kind", "parameters", "size", "bits/weight", "formats"]
    title = f"{result.model} in {result.scheme}"
    console.out.print(console.table(title, columns, result.lines(console.size)))
    for remark in result.remarks:
        console.err.print(remark, style="yellow", markup=False, soft_wrap=True)
