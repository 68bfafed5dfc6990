"""The `fdq` command, run in process."""

import pathlib

from typer.testing import CliRunner

from fdq.cli.app import app

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXT = "def main(argv):\n    return argv\n\n\nclass Reader:\n    pass\n" * 3


def run(*arguments, code=0, stdin=None):
    """The result of a command line; its standard output and error apart."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result
