"""`fdq inspect`: what is in a checkpoint."""

from typing import Annotated

import typer

from fdq.cli import console

NAME = "inspect"
EXAMPLE = "Example:  fdq inspect ernie-w4a16c8 --verify"


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
    json: console.Json = False,
    debug: console.Debug = False,
) -> None:
    """Tensors with their formats, shapes and true bytes; exit code 1 if a checksum differs."""
    from fdq_checkpoints import CheckpointError, inspect

    directory = console.checkpoint_directory(directory)
    result = inspect(directory, subtree=subtree)
    if result.advice is not None:
        console.err.print(result.advice, style="yellow", markup=False, soft_wrap=True)
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
        console.print_json(result.to_dict() | {"problem": problem and str(problem)})
    else:
        # No wrapping: a line is a line, for grep.
        console.out.print(result.text(fold=not every), markup=False, soft_wrap=True)
    if problem is not None:
        console.fail(str(problem), console.FAILED_CHECK)
