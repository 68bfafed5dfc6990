"""`fdq inspect`: what is in a checkpoint."""

import math
import pathlib
from collections.abc import Mapping
from typing import Annotated

import typer

from fdq.cli import console
from fdq.text_table import aligned

NAME = "inspect"
EXAMPLE = (
    "Example:  fdq inspect ernie-w4a16c8 --verify     |     "
    "fdq inspect ernie-w4a16c8 --plot bits.svg --against ERNIE-4.5-0.3B-PT"
)


@console.command
def run(
    directory: console.Directory,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all data and compare every checksum.")
    ] = False,
    subtree: Annotated[
        str | None,
        typer.Option(help="Of an Orbax checkpoint, only what is below this path, such as params."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--every", help="One line a tensor, also where layers are equal.")
    ] = False,
    plot: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE.svg", help="Draw bytes and bits of each layer; with --against its error."
        ),
    ] = None,
    against: Annotated[
        pathlib.Path | None,
        typer.Option(
            parser=console.path, help="The original: what quantization did to its weights."
        ),
    ] = None,
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Tensors with their formats, shapes and true bytes; exit code 1 if a checksum differs."""
    from fdq_checkpoints import CheckpointError, inspect, weight_errors

    console.writable("--plot", plot, ".svg")
    directory = console.checkpoint_directory(directory)
    result = inspect(directory, subtree=subtree)
    if result.advice is not None:
        console.err.print(result.advice, style="yellow", markup=False, soft_wrap=True)
    wrong = None
    if against is not None:
        with console.err.status("Comparing weights ..."):
            wrong = weight_errors(directory, console.checkpoint_directory(against))
    if plot is not None:
        from fdq.analysis.layer_chart import layer_chart

        name = console.spelled(directory.absolute()).rsplit("/", 1)[-1]
        title = f"{name}, {result.scheme or 'not quantized'}: {console.size(result.nbytes)}"
        plot.write_text(layer_chart(title, result.rows, wrong), "utf-8")
    problem = None
    if verify and result.kind not in ("model", "params"):
        console.err.print(
            "There is nothing to compare: only fdq checkpoints have checksums of their content.",
            style="yellow",
        )
    elif verify:
        try:
            with console.err.status("Comparing checksums ..."):
                result = inspect(directory, verify=True)
        except CheckpointError as error:
            problem = error
    if json:
        said = result.to_dict() | {"problem": problem and str(problem)}
        console.print_json(said if wrong is None else said | {"errors": _relative(wrong)})
    else:
        # No wrapping: a line is a line, for grep.
        console.out.print(result.text(fold=not every), markup=False, soft_wrap=True)
        if wrong is not None:
            rows = [(path, f"{error:.3%}") for path, error in _relative(wrong).items()]
            lines = aligned([("weights", "relative error"), *rows], right={1})
            console.out.print(f"\n{lines}", markup=False, soft_wrap=True)
    if problem is not None:
        console.fail(str(problem), console.FAILED_CHECK)


def _relative(errors: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Root of the mean square, against that of the original."""
    return {
        path: math.sqrt(error / norm) if norm else 0.0 for path, (error, norm) in errors.items()
    }
