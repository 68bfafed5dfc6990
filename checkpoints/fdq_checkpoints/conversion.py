"""`convert`: a float checkpoint to a quantized fdq checkpoint, tensor by tensor.

Peak memory is about the largest quantized tensor (the experts of a layer are one) plus a batch. An
interrupted or killed conversion leaves `<destination>.fdq-tmp`, which nothing loads; the same call
goes on from there, and another one (other source, scheme, options or version) starts anew.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fdq.schemes.recipe import Recipe
from fdq_checkpoints import saving, stream, tree_paths
from fdq_checkpoints.inspection import Inspection, inspect
from fdq_checkpoints.readers.local_directory import tell_of_sentencepiece
from fdq_checkpoints.sources import open_source
from fdq_checkpoints.store import adapters, commit, manifest, orbax_store
from fdq_checkpoints.store import journal as journals
from fdq_checkpoints.store.journal import Journal, Pieces
from fdq_checkpoints.store.manifest import TensorEntry
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.tree_paths import Tensor

# A kill loses no more than the work of so many seconds (and the matrix that is being made).
FLUSH_SECONDS = 10.0


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    scheme: Any,
    *,
    dtype: Any = None,
    method: str | None = None,
    compat: str | None = None,
    calibration: Any = None,
    config: Any = None,
    subtree: str | None = None,
    overwrite: bool = False,
    verbose: bool = False,
    progress: stream.Progress | None = None,
) -> Inspection:
    """What `fdq.convert` does and says."""
    stream.check_dtype(dtype)
    commit.check_destination(pathlib.Path(dst).absolute(), overwrite=overwrite)
    with open_source(src, dtype=dtype, config=config, subtree=subtree) as source:
        if source.config is not None:
            tell_of_sentencepiece(source.folder)
        made = stream.Job.of(
            source, scheme, method=method, compat=compat, calibration=calibration, progress=progress
        )
        if made.assigned is not None:
            made.assigned.table.report(verbose=verbose)
        recipe = Recipe() if made.assigned is None else made.assigned.recipe
        seen = made.inputs.calibration
        options = {
            "scheme": None if scheme is None else str(scheme),
            "method": method,
            "compat": compat,
            "calibration": None if seen is None else seen.digest,
        }
        tensors = tree_paths.flatten(made.tree)
        total = sum(saving.nbytes(tensor.value) for tensor in tensors)
        key = _key(made, tensors, options | {"recipe": recipe.to_json()})
        with commit.pending_directory(
            dst,
            overwrite=overwrite,
            keep_unfinished=True,
            needed_bytes=total,
            notes=(journals.FILE_NAME,),
        ) as folder:
            written, resumed = _write(made, folder, key, total, progress)
            # A model keeps its own record, also of what was quantized before.
            record = getattr(made.tree, "recipe_record", None) or recipe.to_json()
            saving.write_manifest(
                folder,
                [written[tensor.path] for tensor in tensors],
                scheme=saving.scheme_name(made.tree) or (None if scheme is None else str(recipe)),
                config=source.config,
                files=source.companions(),
                provenance={"source": source.name, "recipe": record, **options},
            )
            if source.adapters is not None:
                shutil.copytree(source.adapters, folder / adapters.FOLDER, dirs_exist_ok=True)
            if resumed:
                # What the killed process wrote was never looked at again.
                StoredTensors(folder).verify()
    return inspect(dst)


def _key(made: stream.Job, tensors: list[Tensor], options: dict[str, Any]) -> str:
    """Equal for equal jobs: what is read, what is to be made of it, and by which versions."""
    described = []
    for tensor in tensors:
        value, spec = tensor.value, getattr(tensor.value, "spec", None)
        kinds = [[name, a.shape, a.dtype.name] for name, a in tree_paths.arrays_of(value).items()]
        # Calibrated scales are known before anything is read.
        known = isinstance(value, jax.Array)
        digest = hashlib.sha256(np.asarray(value).tobytes()).hexdigest() if known else None
        described.append([tensor.path, repr(tensor.activation), repr(spec), *kinds, digest])
    content = [made.source.state, described, options, saving.versions()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _write(
    made: stream.Job, folder: pathlib.Path, key: str, total: int, progress: stream.Progress | None
) -> tuple[dict[tree_paths.Path, TensorEntry], bool]:
    """Write all tensors; by path what was written, and whether an earlier process wrote some."""
    weights = folder / manifest.WEIGHTS
    journal = Journal(folder / journals.FILE_NAME, key)
    entries = {entry.path: entry for entry in journal.done}
    if journal.finished and weights.is_dir():
        return entries, True
    resumed = journal.has_work and orbax_store.keep_only(weights, journal.batches)
    if not resumed:
        entries = {}
        commit.empty(folder)
        journal.begin()
    fresh: list[TensorEntry] = []

    def keep() -> None:
        with _whole():
            writer.flush()
            pieces.flush()

    def record(names: list[str]) -> None:
        journal.add(names, fresh)
        fresh.clear()
        pieces.drop_done()

    writer = orbax_store.TreeWriter(
        weights, total_bytes=total, on_batch=record, seconds=FLUSH_SECONDS
    )
    pieces = Pieces(folder, journal, seconds=FLUSH_SECONDS, keep=keep)
    try:
        for tensor in made.tensors(progress=progress, skip=frozenset(entries), pieces=pieces):
            with _whole():
                entry = saving.write_tensor(writer, tensor)
                entries[entry.path] = entry
                fresh.append(entry)
                writer.flush_if_full()
        with _whole():
            writer.finalize()
            pieces.drop_done()
            journal.finish()
    except KeyboardInterrupt:
        if not journal.finished:
            with contextlib.suppress(KeyboardInterrupt):
                keep()
        raise KeyboardInterrupt(_kept(made, journal, folder)) from None
    return entries, resumed


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Holds a Ctrl-C back until the end: a batch is written and in the journal, or neither."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if pressed:
        raise KeyboardInterrupt


def _kept(made: stream.Job, journal: Journal, folder: pathlib.Path) -> str:
    tensors = {tensor.path: tensor for tensor in tree_paths.flatten(made.tree)}
    sizes = {path: saving.nbytes(tensor.value) for path, tensor in tensors.items()}
    done = sum(sizes[entry.path] for entry in journal.done)
    if not journal.has_work:
        return "Nothing was finished yet; the same call starts anew."
    part = ""
    if journal.pieces:
        piece = journal.pieces[-1]
        part = f" and {piece.stop} of the {tensors[piece.path].value.shape[0]} matrices of the next"
    return (
        f"Kept {len(journal.done)} of {len(sizes)} tensors ({done / sum(sizes.values()):.0%} of "
        f"the bytes){part} in {folder}. The same call goes on from there; to drop them, remove "
        "that directory."
    )
