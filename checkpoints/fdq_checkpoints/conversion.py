"""`convert`: a float checkpoint to a quantized fdq checkpoint, tensor by tensor.

Peak memory is about the largest quantized tensor (the experts of a layer are one) plus a batch. A
killed conversion leaves `<destination>.fdq-tmp`, which nothing loads; the same call goes on from
there, and another one (other source, scheme, options or version) starts anew.
"""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from fdq.schemes.recipe import Recipe
from fdq_checkpoints import adapters, saving, stream, tree_paths
from fdq_checkpoints.inspection import Inspection, inspect
from fdq_checkpoints.sources import open_source
from fdq_checkpoints.store import commit, manifest, orbax_store
from fdq_checkpoints.store.manifest import TensorEntry
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.tree_paths import Tensor

_JOURNAL = "journal"


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
        made = stream.Job.of(
            source, scheme, method=method, compat=compat, calibration=calibration, progress=progress
        )
        if verbose and made.assigned is not None:
            print(made.assigned.table.summary())
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
            dst, overwrite=overwrite, keep_unfinished=True, needed_bytes=total
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
    """Write all tensors; by path what was written, and whether a killed process wrote some."""
    weights = folder / manifest.WEIGHTS
    journal = folder / _JOURNAL
    done, batches = _read_journal(journal, key)
    resumed = bool(done) and orbax_store.keep_only(weights, batches)
    if not resumed:
        done = []
        commit.empty(folder)
        _append(journal, {"key": key})
    fresh: list[TensorEntry] = []

    def record(names: list[str]) -> None:
        written = [manifest.tensor_to_json(entry) for entry in fresh]
        _append(journal, {"batches": names, "tensors": written})
        fresh.clear()

    writer = orbax_store.TreeWriter(weights, total_bytes=total, on_batch=record)
    entries = {entry.path: entry for entry in done}
    for tensor in made.tensors(progress=progress, skip=frozenset(entries)):
        entry = saving.write_tensor(writer, tensor)
        entries[entry.path] = entry
        fresh.append(entry)
        writer.flush_if_full()
    writer.finalize()
    journal.unlink()
    return entries, resumed


def _append(journal: pathlib.Path, content: dict[str, Any]) -> None:
    with open(journal, "a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_journal(journal: pathlib.Path, key: str) -> tuple[list[TensorEntry], list[str]]:
    """Tensors and batches that an earlier process wrote for the same job; else nothing."""
    if not journal.is_file():
        return [], []
    lines = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # the process was killed while it wrote this line
            break
    if not lines or lines[0].get("key") != key:
        return [], []
    written = [entry for line in lines[1:] for entry in line["tensors"]]
    entries = [manifest.tensor_from_json(entry, str(journal)) for entry in written]
    return entries, lines[-1].get("batches", [])
