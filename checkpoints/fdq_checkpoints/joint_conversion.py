"""`convert` by several processes (`jax.distributed`), which all call it."""

import os
import shutil
from typing import Any

from fdq.schemes.recipe import Recipe
from fdq_checkpoints import saving, stream, tree_paths
from fdq_checkpoints.store import adapters, commit, processes


def convert(
    source: Any,
    dst: str | os.PathLike[str],
    scheme: Any,
    overwrite: bool,
    options: dict[str, Any],
    progress: stream.Progress | None,
) -> None:
    """`fdq.convert`: all processes make every tensor, the first writes, nothing is gone on with.

    One process alone is as fast, and what it leaves can be gone on from.
    """
    made = stream.Job.of(source, scheme, progress=progress, **options)
    recipe = Recipe() if made.assigned is None else made.assigned.recipe
    tensors = tree_paths.flatten(made.tree)
    total = sum(saving.nbytes(tensor.value) for tensor in tensors)

    def pending() -> processes.Directory:
        return commit.pending_directory(dst, overwrite=overwrite, needed_bytes=total)

    with processes.directory_of_first(pending, commit.pending_path(dst)) as folder:
        seen = made.inputs.calibration
        named = {"scheme": None if scheme is None else str(scheme), **options}
        named["calibration"] = None if seen is None else seen.digest
        record = saving.history(made.tree, recipe.to_json())
        saving.write_manifest(
            folder,
            saving.write(folder, made.tensors(progress=progress), total),
            scheme=saving.scheme_name(made.tree) or (None if scheme is None else str(recipe)),
            config=source.config,
            files=source.companions(),
            provenance={"source": source.name, **record, **named, **saving.text_seen(seen)},
        )
        if source.adapters is not None and processes.is_first():
            shutil.copytree(source.adapters, folder / adapters.FOLDER, dirs_exist_ok=True)
