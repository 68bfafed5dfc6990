"""The error that every reader and writer of checkpoints raises for content that it refuses."""

import difflib
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint, or a file of one, cannot be used; the message says which, why, what to do."""


def shown(name: str) -> str:
    """A name from an untrusted file, quoted, escaped and cut so that it is safe to print."""
    text = ascii(name) if not name.isprintable() else repr(name)
    return text if len(text) <= 120 else text[:100] + "…" + text[-1]


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`" The nearest present name is 'x'."`, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(candidates)[:20_000], n=1, cutoff=0.6)
    return f" The nearest present name is {shown(close[0])}." if close else ""
