"""`fdq plan`: bytes of a model under a scheme, before anything is loaded."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from fdq.cli import console
from fdq.cli.schemes import read_scheme

NAME = "plan"
EXAMPLE = "Example:  fdq plan ernie-4.5-300b-a47b --scheme WINT4 --context 131072"


@console.command
def run(
    model: Annotated[
        str,
        typer.Argument(help="Name of a known model, or a directory with a config.json."),
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
    with console.err.status("Quantizing shapes ..."):
        result = plan(known, read_scheme(scheme), context=context, batch=batch, compat=compat)
    if json:
        console.print_json(result.to_dict())
        return
    rows = []
    for kind, parameters, size, formats in result.rows():
        rows.append(_row(kind, parameters, size, formats))
    rows.append(_row("all weights", result.weights.parameters, result.weights.bytes, ""))
    cache = f"{result.cache}, {batch} x {context:,} tokens"
    rows.append(("cache", "", console.size(result.cache_bytes), "", cache))
    rows.append(("total", "", console.size(result.total_bytes), "", ""))
    columns = ["kind", "parameters", "size", "bits/weight", "formats"]
    console.out.print(console.table(f"{result.model} in {result.scheme}", columns, rows))


def _row(kind: str, parameters: int, size: int, formats: str) -> tuple[str, ...]:
    bits = f"{8 * size / parameters:.3f}"
    return kind, f"{parameters:,}", console.size(size), bits, formats
