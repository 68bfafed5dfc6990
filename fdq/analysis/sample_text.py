"""Text that every Python installation has: the sources of its own standard library.

A small model needs text to be trained on and other text to be measured on, and a library should
neither download nor ship either. CPython's standard library is about 9 MB of prose and code under
the PSF licence. A file is held out when

    sha256(path relative to the library, with forward slashes) mod 20 == 0

so the split depends on names only and is the same on every machine; the contents differ a little
between Python versions, which is why each `SampleText` carries the hash of its text.
`REFERENCE_SHA256` is the hash of `heldout_text()` with which this project's figures were made.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Sequence

import numpy as np

HELDOUT_MODULUS = 20
DEFAULT_HELDOUT_BYTES = 65_536
_LONGEST_TOKEN = 16  # characters

# sha256 of `heldout_text().text` with CPython 3.12.1.
REFERENCE_SHA256 = "6fdfeb73e18f749f5a79ba467c905cf65af62c6dc541274ebfa332b5c303184c"

_EXCLUDED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests",
}  # fmt: skip
# Written when Python is built, so they differ between machines of the same version.
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True)
class SampleText:
    """Files' contents joined by newlines, and which text that was.

    `sha256` is the hexadecimal hash of `text` in UTF-8, `python` a version such as "3.12.1";
    `files` are relative to the standard library, in the order of `text`, the last perhaps cut.
    """

    text: str
    sha256: str
    python: str
    files: tuple[str, ...]


def is_held_out(relative_path: str) -> bool:
    """Whether the file `relative_path` ("json/decoder.py") is in the held-out split (1 in 20)."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest, "big") % HELDOUT_MODULUS == 0


def source_files(
    *, held_out: bool, root: str | pathlib.Path | None = None
) -> tuple[tuple[str, str], ...]:
    """The files of one split as (relative path, contents), sorted by path.

    None of `root` means the running Python's standard library. FileNotFoundError where there are no
    sources (some embedded and frozen Pythons ship byte code or a zip file only).
    """
    folder = pathlib.Path(sysconfig.get_path("stdlib") if root is None else root)
    if not folder.is_dir():
        raise FileNotFoundError(_no_sources(folder, "it is not a folder"))
    paths = [path.relative_to(folder) for path in folder.rglob("*.py") if path.is_file()]
    names = sorted(path.as_posix() for path in paths if not _excluded(path))
    if not names:
        raise FileNotFoundError(_no_sources(folder, "it has no .py files"))
    files = []
    for name in names:
        if is_held_out(name) == held_out:
            with contextlib.suppress(UnicodeDecodeError):
                text = (folder / name).read_bytes().decode("utf-8")
                files.append((name, text.replace("\r\n", "\n")))
    return tuple(files)


def training_text(*, root: str | pathlib.Path | None = None) -> SampleText:
    """All text of the training split (about 9 MB); `root` and errors as in `source_files`."""
    return _join(source_files(held_out=False, root=root), max_bytes=None)


def calibration_rows(
    encode: Callable[[str], Sequence[int]], rows: int, *, length: int = 256
) -> np.ndarray:
    """Tokens int32 `[rows, length]` of the training split, from the beginnings of its files.

    `encode` makes tokens of a file's first 4096 characters. Fewer rows where the split ends.
    """
    ids: list[int] = []
    for _, text in source_files(held_out=False):
        ids += encode(text[:4096])
        if len(ids) >= rows * length:
            break
    whole = min(rows * length, len(ids) // length * length)
    return np.asarray(ids[:whole], np.int32).reshape(-1, length)


def file_rows(
    encode: Callable[[str], Sequence[int]],
    path: pathlib.Path,
    rows: int,
    *,
    length: int = 256,
    least: int = 1,
    purpose: str = "calibration",
) -> np.ndarray:
    """Tokens int32 `[rows, length]` of the beginning of a file in UTF-8.

    Fewer rows where it ends, and one shorter row of a text that has not `length` tokens.

    Raises:
      ValueError: no UTF-8, nothing in it, or fewer than `least` tokens, for a `purpose` in words.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path}: empty; {purpose} needs text.")
    # A token is seldom longer; the rest of a long file need not be looked at.
    ids = encode(text[: _LONGEST_TOKEN * rows * length])[: rows * length]
    if len(ids) < least:
        raise ValueError(
            f"{path}: {len(ids)} tokens are too few for {purpose}; give at least {least}, better "
            f"{rows * length}."
        )
    length = min(length, len(ids))
    return np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)


def heldout_text(
    *, max_bytes: int | None = DEFAULT_HELDOUT_BYTES, root: str | pathlib.Path | None = None
) -> SampleText:
    """The first `max_bytes` bytes of the held-out split's files, joined by newlines.

    A character that the cut would split is dropped; None means all of it (about 500 KB). `root`
    and errors as in `source_files`; ValueError where `max_bytes` is not positive.
    """
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"`max_bytes` (={max_bytes}) must be positive, or None for all text.")
    return _join(source_files(held_out=True, root=root), max_bytes=max_bytes)


def _excluded(relative: pathlib.PurePath) -> bool:
    return not _EXCLUDED_FOLDERS.isdisjoint(relative.parts[:-1]) or any(
        part.startswith(_EXCLUDED_PREFIXES) for part in relative.parts
    )


def _join(files: tuple[tuple[str, str], ...], *, max_bytes: int | None) -> SampleText:
    names: list[str] = []
    data = bytearray()
    for name, text in files:
        if max_bytes is not None and len(data) >= max_bytes:
            break
        if names:
            data += b"\n"
        names.append(name)
        data += text.encode("utf-8")
    text = bytes(data[:max_bytes]).decode("utf-8", errors="ignore")
    return SampleText(
        text=text,
        sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        python=platform.python_version(),
        files=tuple(names),
    )


def _no_sources(folder: pathlib.Path, reason: str) -> str:
    hint = "may have been installed without sources"
    if folder.suffix == ".zip" or folder.is_file():
        hint = "imports its standard library from a zip file"
    return (
        f"No standard library sources found: looked in {folder}, but {reason}. This Python {hint}. "
        "Use a regular CPython installation, or pass `root`, a folder of .py files."
    )
