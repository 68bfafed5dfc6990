"""What is measured, between marks in a page: everything else there is written by people."""

from __future__ import annotations

import pathlib

from benchmarks import atomic_file

Marks = tuple[str, str]


def marks(name: str) -> Marks:
    """The comments around the part `name` of a Markdown page."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def part(text: str, name: str) -> str:
    """What stands between the marks of `name`.

    Raises:
      ValueError: the marks are missing.
    """
    begin, end = marks(name)
    if begin not in text or end not in text.partition(begin)[2]:
        raise ValueError(f"the page lacks the marks {begin} and {end} around its part")
    return text.partition(begin)[2].partition(end)[0].strip()


def filled(text: str, name: str, made: str) -> str:
    """The text with another part between the marks; ValueError as `part`."""
    part(text, name)
    begin, end = marks(name)
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"


def fill(path: pathlib.Path, name: str, made: str) -> None:
    """Writes a part of a page; ValueError as `part`."""
    atomic_file.write(path, filled(path.read_text("utf-8"), name, made))
