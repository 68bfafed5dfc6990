"""The user's directory for what may be deleted at any time."""

import os
import pathlib

VARIABLE = "FDQ_CACHE_DIR"


def user_cache() -> pathlib.Path | None:
    """`FDQ_CACHE_DIR`, else `fdq` in `XDG_CACHE_HOME`, else in `~/.cache`.

    None where there shall be none: `FDQ_CACHE_DIR` is empty, or nobody's home is known.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return pathlib.Path(given).expanduser() if given else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "fdq"
    except RuntimeError:
        return None
