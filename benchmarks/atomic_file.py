"""Files that are whole at any moment: a run that is ended while it writes leaves the last ones."""

from __future__ import annotations

import os
import pathlib
import tempfile


def write(path: pathlib.Path, text: str) -> None:
    """Replaces a file by ``text``, or makes it with its directories; never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's is for the owner alone
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise
