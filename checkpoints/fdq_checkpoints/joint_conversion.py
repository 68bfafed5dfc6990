"""`convert` by several processes (`jax.distributed`), which all call it."""

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from fdq.schemes.recipe import Recipe
from fdq_checkpoints import saving, stream, tree_paths
from fdq_checkpoints.readers.local_directory import tell_of_sentencepiece
from fdq_checkpoints.sources import Source
from fdq_checkpoints.store import adapters, commit, processes


def convert(
    open_it: Callable[[], contextlib.AbstractContextManager[Source]],
    dst: pathlib.Path,
    scheme: Any,
    overwrite: bool,
    options: dict[str, Any],
    *,
    verbose: bool,
    progress: stream.Progress | None,
) -> None:
    """`fdq.convert`: all processes make every tensor, the first writes, nothing is gone on with.

    One process alone is as fast, and what it leaves can be gone on from. What fails in one process
    ends all of them before any waits for it.
    """
    with contextlib.ExitStack() as stack:
        source = processes.checked(lambda: stack.enter_context(open_it()), dst)
        make = functools.partial(stream.Job.of, source, scheme, progress=progress, **options)
        made = processes.checked(make, dst)
        if source.config is not None and processes.is_first():
            tell_of_sentencepiece(source.folder)
        if made.assigned is not None and processes.is_first():
            made.assigned.table.report(verbose=verbose)
        named = {"scheme": None if scheme is None else str(scheme), **options}
        _write(source, made, dst, overwrite, named, progress)


def _write(
    source: Source,
    made: stream.Job,
    dst: pathlib.Path,
    overwrite: bool,
    named: dict[str, Any],
    progress: stream.Progress | None,
) -> None:
    scheme = named["scheme"]
    recipe = Recipe() if made.assigned is None else made.assigned.recipe
    tensors = tree_paths.flatten(made.tree)
    total = sum(saving.nbytes(tensor.value) for tensor in tensors)

    def pending() -> processes.Directory:
        return commit.pending_directory(dst, overwrite=overwrite, needed_bytes=total)

    with processes.directory_of_first(pending, commit.pending_path(dst)) as folder:
        seen = made.inputs.calibration
        named = {**named, "calibration": None if seen is None else seen.digest}
        record = saving.history(made.tree, recipe.to_json())
        saving.write_manifest(
            folder,
            saving.write(folder, processes.in_step(made.tensors(progress=progress), dst), total),
            scheme=saving.scheme_name(made.tree) or (None if scheme is None else str(recipe)),
            config=source.config,
            files=source.companions(),
            provenance={"source": source.name, **record, **named, **saving.text_seen(seen)},
        )
        if source.adapters is not None and processes.is_first():
            shutil.copytree(source.adapters, folder / adapters.FOLDER, dirs_exist_ok=True)
