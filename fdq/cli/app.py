"""The `fdq` command: its sub-commands and their order in the help."""

from typing import Annotated

import typer

import fdq
from fdq.cli import (
    chat,
    completion,
    convert,
    demo,
    evaluate,
    export,
    generate,
    heal,
    inspect,
    kernels,
    models,
    plan,
    recommend,
    schemes,
)

app = typer.Typer(
    name="fdq",
    help="Quantize large language models in JAX and decode them fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fdq {fdq.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for module in (
    demo,
    convert,
    heal,
    export,
    inspect,
    generate,
    chat,
    evaluate,
    plan,
    recommend,
    schemes,
    models,
    kernels,
    completion,
):
    app.command(module.NAME, epilog=module.EXAMPLE)(module.run)
