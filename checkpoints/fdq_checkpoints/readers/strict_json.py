"""JSON from untrusted files: bounded in size and depth, no duplicate keys, no NaN.

Python's parser accepts all of these, silently keeping the last of two equal keys.
"""

import json
import os
import pathlib
import re
from typing import Any

from fdq_checkpoints.errors import CheckpointError, shown

MAX_DEPTH = 64


def parse(data: bytes, *, where: str) -> Any:
    """Parse UTF-8 JSON; `where`, the name of the bytes, begins every error."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 (byte {error.start}).") from None
    _check_depth(text, where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{where}: the key {shown(key)} appears twice.")
            result[key] = value
        return result

    def refuse_constant(name: str) -> Any:
        raise CheckpointError(f"{where}: {name} is not a JSON number.")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: half a surrogate pair, which is no text.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})."
        ) from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        # int() refuses numbers of more than 4300 digits.
        raise CheckpointError(f"{where}: not valid JSON ({error}).") from None


def read_object(path: str | os.PathLike[str], *, max_bytes: int) -> dict[str, Any]:
    """Read a regular file that holds one JSON object in at most `max_bytes`."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file.")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(
            f"{path}: {size} bytes, more than the {max_bytes} such a file may have."
        )
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file. Run `git lfs pull` first.")
    value = parse(data, where=str(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


def _check_depth(text: str, where: str) -> None:
    """Bound the nesting before the recursive parser sees it."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        token = match[0]
        if token in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise CheckpointError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels.")
        elif token in ("]", "}"):
            depth -= 1
