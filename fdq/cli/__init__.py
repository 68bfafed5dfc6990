"""The `fdq` command; needs the extra `fdq[cli]`.

`main` is the entry point. One file holds one command; `fdq.cli.app` puts them together and
`fdq.cli.console` holds what they share: output, errors, exit codes.
"""

from __future__ import annotations

import sys

# Modules of the extra: their absence is explained, that of any other is a defect and is shown.
_EXTRA = ("typer", "rich", "tokenizers")


def main() -> None:
    """Runs the command line; exits with 0, 1 (a check failed), 2 (wrong use) or 130 (Ctrl-C)."""
    try:
        from fdq.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        print(
            f"The fdq command needs the package {error.name!r}, which the extra `cli` installs: "
            "pip install 'fdq[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="fdq")
