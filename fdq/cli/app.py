"""The `fdq` command: its sub-commands and their order in the help."""

from __future__ import annotations

import typer

from fdq.cli import convert, demo, evaluate, generate, inspect, plan

app = typer.Typer(
    name="fdq",
    help="Quantize large language models in JAX and decode them fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (demo, convert, inspect, generate, evaluate, plan):
    app.command(module.NAME, epilog=module.EXAMPLE)(module.run)
