"""A directory that appears whole or not at all.

Everything is written into the sibling `<destination>.fdq-tmp`, synced to disk, and renamed. A
process that dies leaves the sibling, which nothing loads; an error removes it, unless it is of use.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from fdq.text_table import size
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.local_directory import gguf_parts
from fdq_checkpoints.store import journal as journals
from fdq_checkpoints.store import manifest, stopping

SUFFIX = ".fdq-tmp"
_LOCK = "lock"
_SPARE_BYTES = 16 * 2**20
_TRIES = 100
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextlib.contextmanager
def pending_directory(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    keep: Callable[[], bool] | None = None,
    needed_bytes: int = 0,
    notes: tuple[str, ...] = (),
    replaces: "Replaceable | None" = None,
) -> Iterator[pathlib.Path]:
    """A context that yields the temporary sibling of `destination` and renames it at the end.

    `overwrite` replaces an fdq checkpoint that is there (it stays until the new one is complete).
    `keep` says after an error whether what was written is of use; with it, the context begins with
    what is there instead of an empty directory. `needed_bytes` estimates what will be written.
    `notes` are names of files that are of use until the end, and removed then.
    `replaces` says what else than an fdq checkpoint may be replaced.
    """
    final = pathlib.Path(destination).absolute()
    replaces = FDQ_CHECKPOINT if replaces is None else replaces
    check_destination(final, overwrite=overwrite, replaces=replaces)
    if overwrite:
        check_destination(_old(final), overwrite=True, replaces=replaces)
    final.parent.mkdir(parents=True, exist_ok=True)
    pending = pending_path(final)
    needed_bytes -= _bytes_done(pending) if keep is not None else 0
    free = shutil.disk_usage(final.parent).free
    if needed_bytes > 0 and needed_bytes + _SPARE_BYTES > free:
        raise CheckpointError(
            f"{final.parent}: about {size(needed_bytes)} are needed, beside a reserve of "
            f"{size(_SPARE_BYTES)}, but {size(free)} are free. Free some space or choose "
            "another disk."
        )
    if pending.is_symlink():
        raise CheckpointError(f"{pending}: a link; it would be emptied. Remove it.")
    pending.mkdir(exist_ok=True)
    with _locked(pending):
        if keep is None:
            _check_droppable(pending, overwrite)
            empty(pending)
        try:
            yield pending
            _sync(pending)
            with stopping.whole():
                old = _rename(pending, final, overwrite=overwrite, replaces=replaces)
                # Not before: without its lock, another process would take and empty the directory.
                for name in (*notes, _LOCK):
                    (final / name).unlink(missing_ok=True)
        except BaseException:
            if keep is None or not keep():
                shutil.rmtree(pending, ignore_errors=True)
            raise
        if old is not None:
            _remove(old, replaces)


def _check_droppable(pending: pathlib.Path, overwrite: bool) -> None:
    """FileExistsError where a conversion that was stopped would lose its work."""
    if (pending / journals.FILE_NAME).is_file() and not overwrite:
        raise FileExistsError(
            f"{pending}: holds the work of a conversion that was stopped. Finish it, choose "
            "another destination, or drop it with overwrite=True (--overwrite)."
        )


def pending_path(destination: str | os.PathLike[str]) -> pathlib.Path:
    """The temporary sibling."""
    final = pathlib.Path(destination).absolute()
    return final.with_name(final.name + SUFFIX)


@dataclasses.dataclass(frozen=True)
class Replaceable:
    """What may be overwritten: a word for it, and whether a directory is one."""

    word: str
    is_one: Callable[[pathlib.Path], bool]


FDQ_CHECKPOINT = Replaceable(
    "an fdq checkpoint", lambda folder: (folder / manifest.FILE_NAME).is_file()
)


def check_destination(
    final: pathlib.Path,
    *,
    overwrite: bool,
    source: pathlib.Path | None = None,
    replaces: Replaceable = FDQ_CHECKPOINT,
) -> None:
    """Raise FileExistsError unless `final` is free, empty, or what it `replaces`, to overwrite.

    What is read (`source`) must not be written into: it would be part of itself.
    """
    if source is not None and source.is_dir():
        inside = pathlib.Path(os.path.realpath(final)), source.resolve()
        if inside[0] == inside[1] or inside[1] in inside[0].parents:
            raise FileExistsError(
                f"{final}: is inside the source, {source}. Choose a destination outside of it."
            )
    if not os.path.lexists(final) or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{final}: exists already. Choose another destination, or pass overwrite=True to "
            f"replace {replaces.word}."
        )
    if not replaces.is_one(final):
        raise FileExistsError(f"{final}: exists and is not {replaces.word}; not overwritten.")


def empty(pending: pathlib.Path) -> None:
    """Remove everything in the temporary directory but its lock."""
    for entry in pending.iterdir():
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextlib.contextmanager
def _locked(pending: pathlib.Path) -> Iterator[None]:
    lock = pending / _LOCK
    busy = CheckpointError(
        f"{pending}: another process is writing it. Wait for it, or choose another destination."
    )
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:  # just renamed by a process that was done
        raise busy from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
            raise busy  # the lock that we have is no longer that of this directory
        yield
    finally:
        os.close(descriptor)  # a killed process releases its lock as well


def bytes_in(folder: pathlib.Path) -> int:
    """Of all files, at any depth; of a model in GGUF of its own."""
    if folder.is_file():
        return sum(path.stat().st_size for path in gguf_parts(folder))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes_done(pending: pathlib.Path) -> int:
    """Of a conversion that was stopped; once of links, none of pieces: batches take their place."""
    files = {}
    for path in pending.rglob("*"):
        if path.is_file() and path.relative_to(pending).parts[0] != journals.PIECES:
            found = path.stat()
            files[found.st_dev, found.st_ino] = found.st_size
    return sum(files.values())


def _sync(folder: pathlib.Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_path(os.path.join(root, name))
        _sync_path(root)


def _sync_path(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(
    pending: pathlib.Path, final: pathlib.Path, *, overwrite: bool, replaces: Replaceable
) -> pathlib.Path | None:
    """Where what was replaced is now; None where nothing was.

    `final` is at any time what it was or what it is to be, where the system can exchange two.
    """
    check_destination(final, overwrite=overwrite, replaces=replaces)
    old = _old(final)
    if not os.path.lexists(final):
        os.rename(pending, final)
        _sync_path(final.parent)
        return None
    _remove(old, replaces)
    if final.is_symlink() or not _exchanged(pending, final):
        os.rename(final, old)
        try:
            os.rename(pending, final)
        except OSError:
            os.rename(old, final)
            raise
    else:
        os.rename(pending, old)
    _sync_path(final.parent)
    return old


def _old(final: pathlib.Path) -> pathlib.Path:
    """Where what is replaced is, until it is removed."""
    return final.with_name(final.name + ".fdq-old")


def _exchanged(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two directories have changed places, at once (Linux, most file systems)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def unreplaced(path: str | os.PathLike[str], read: Callable[[], Any]) -> Any:
    """What `read` gives of an fdq checkpoint that nobody replaced meanwhile.

    Where another process put a new one in its place, what was read of both is dropped, and read
    again.
    """
    for _ in range(_TRIES):
        before, result = _state(path), None
        try:
            result = read()
        except (CheckpointError, OSError):
            if not _replaced(path, before):
                raise
        else:
            if before is None or _state(path) == before:
                return result
    raise CheckpointError(f"{path}: other processes replace it all the time. Try again.")


def _state(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Equal for the same checkpoint; None where there is none."""
    try:
        found = os.stat(os.path.join(path, manifest.FILE_NAME))
    except (OSError, ValueError, TypeError):  # what is no path is said by whoever reads
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _replaced(path: str | os.PathLike[str], before: tuple[int, ...] | None) -> bool:
    """Whether another one is there, or about to be: between two renames there may be none."""
    old = os.fspath(path).rstrip("/") + ".fdq-old"
    for _ in range(_TRIES):
        after = _state(path)
        if after is not None:
            return after != before
        if not os.path.lexists(old):
            return False
        time.sleep(0.01)
    return False


def _remove(old: pathlib.Path, replaces: Replaceable) -> None:
    """Remove a replaced checkpoint, empty directory, or link (what it leads to stays)."""
    if old.is_symlink():
        old.unlink()
    elif old.exists():
        check_destination(old, overwrite=True, replaces=replaces)
        # What tells that it is ours goes last: a removal that was stopped goes on.
        for entry in sorted(old.iterdir(), key=lambda entry: entry.name == manifest.FILE_NAME):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        old.rmdir()


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
