"""`export`: a model as other programs read it."""

import dataclasses
import os
import pathlib
from typing import Any

from fdq import models
from fdq_checkpoints import stream
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.export import EXPORTERS, Exporter, Options
from fdq_checkpoints.export.origin import opened
from fdq_checkpoints.readers.file_names import TEMPLATES, is_template
from fdq_checkpoints.readers.local_directory import local_destination
from fdq_checkpoints.store import commit


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `fdq.export` wrote.

    Attributes:
      path: the directory.
      to: the exporter.
      nbytes: of all files.
      formats: how many tensors of the model are stored in which way.
      notes: what whoever reads the files should know, a line each.
    """

    path: pathlib.Path
    to: str
    nbytes: int
    formats: dict[str, int]
    notes: tuple[str, ...]


def export(
    model: Any,
    dst: str | os.PathLike[str],
    *,
    to: str,
    dtype: Any = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: stream.Progress | None = None,
) -> Exported:
    """What `fdq.export` does and says."""
    local_destination(dst)
    exporter = EXPORTERS[to]
    stream.check_dtype(dtype)
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ValueError(f"shard_bytes (={shard_bytes!r}) must be a positive whole number.")
    final = pathlib.Path(dst).absolute()
    if not isinstance(model, models.Decoder):
        _check_apart(model, final)
    replaces = _replaceable(exporter)
    commit.check_destination(final, overwrite=overwrite, replaces=replaces)
    with opened(model) as origin:
        plan = exporter.plan(origin, Options(dtype=dtype, shard_bytes=shard_bytes))
        with commit.pending_directory(
            final, overwrite=overwrite, needed_bytes=plan.nbytes, replaces=replaces
        ) as folder:
            plan.write(folder, progress)
    return Exported(final, to, commit.bytes_in(final), plan.formats, plan.notes)


def _replaceable(exporter: Exporter) -> commit.Replaceable:
    """A directory of nothing but files that the exporter writes."""

    def is_one(folder: pathlib.Path) -> bool:
        if folder.is_symlink() or not folder.is_dir():
            return False
        files = list(folder.iterdir())
        return bool(files) and all(map(wrote, files))

    def wrote(path: pathlib.Path) -> bool:
        if path.name != TEMPLATES or path.is_symlink() or not path.is_dir():
            return path.is_file() and exporter.wrote(path)
        below = list(path.iterdir())
        return all(file.is_file() and is_template(f"{TEMPLATES}/{file.name}") for file in below)

    return commit.Replaceable(f"an export to {exporter.name}", is_one)


def _check_apart(model: Any, final: pathlib.Path) -> None:
    """CheckpointError where one of the directories is in the other, or the same."""
    if not isinstance(model, str | os.PathLike):
        return  # `opened` says what it should be
    source, target = pathlib.Path(model).resolve(), final.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise CheckpointError(
            f"{final}: the export would be written into {model}, or over it. Choose a directory "
            "beside it."
        )
