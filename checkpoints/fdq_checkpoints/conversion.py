"""``convert``: a float checkpoint to a quantized fdq checkpoint, tensor by tensor.

Peak memory is about the largest quantized tensor (the experts of a layer are one) plus one batch
of what is to be written, whatever the model's size. A killed conversion leaves a directory
``<destination>.fdq-tmp`` that nothing loads; the same call goes on from there, and a different one
(other source, scheme, options or version) starts anew.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from fdq import models
from fdq.schemes.recipe import Recipe
from fdq_checkpoints import saving, stream, tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.inspection import Inspection, inspect
from fdq_checkpoints.loading import abstract_quantized, load, stored_config
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.store import commit, manifest, orbax_store
from fdq_checkpoints.store.manifest import Manifest, TensorEntry
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.tree_paths import Path, Tensor

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
    config: models.DecoderConfig | None = None,
    subtree: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    progress: stream.Progress | None = None,
) -> Inspection:
    """Quantize the checkpoint at `src` into a new fdq checkpoint at `dst`.

    Args:
      src: a directory: Hugging Face or Paddle (a model comes out), an fdq checkpoint of floats, or
        an Orbax checkpoint of yours, written by either of its APIs from an NNX state, Linen
        params or any tree (a tree comes out, in which lists have become dicts).
      dst: the directory to make.
      scheme: anything that ``fdq.quantize`` takes; None keeps the floats.
      dtype: of a model's tensors that are not quantized; by default that of the source.
      method: how scales are chosen, as in ``fdq.quantize``.
      compat: as in ``fdq.quantize``.
      calibration: for schemes with static scales: what ``fdq.calibrate`` returned, or sample
        tokens ``[batch, length]``. The float model is then in memory as a whole.
      config: makes a model of an Orbax checkpoint whose tree is that of ``fdq.models.Decoder``.
      subtree: of an Orbax checkpoint, convert only what is below this dotted path (``params``).
      overwrite: replace an fdq checkpoint at `dst`.
      quiet: do not print what was quantized and what was left.
      progress: called after each tensor with (bytes done, bytes in all, path).

    Returns:
      The table of the new checkpoint.

    Raises:
      FileExistsError: `dst` exists.
      FileNotFoundError: `src` does not exist.
      CheckpointError: the source is refused, or the disk is too small. Nothing is left behind.
      ValueError: a dtype that models do not compute in.
    """
    stream.check_dtype(dtype)
    commit.check_destination(pathlib.Path(dst).absolute(), overwrite=overwrite)
    if calibration is not None:
        if config is not None or subtree is not None:
            raise CheckpointError(
                f"{src}: config= and subtree= do not go with calibration=. Convert without a "
                "scheme first, and then what comes out."
            )
        model = load(
            src,
            scheme,
            dtype=dtype,
            calibration=calibration,
            method=method,
            compat=compat,
            quiet=quiet,
            progress=progress,
        )
        saving.save(model, dst, overwrite=overwrite, provenance={"source": pathlib.Path(src).name})
        return inspect(dst)
    with _opened(pathlib.Path(src), dtype=dtype, config=config, subtree=subtree) as source:
        tree = abstract_quantized(source.tree, scheme, method=method, compat=compat, quiet=quiet)
        recipe = Recipe.parse(scheme, compat=compat, has_experts=source.has_experts)
        options = {
            "scheme": None if scheme is None else str(scheme),
            "method": method,
            "compat": compat,
        }
        job = _Job(source, tree_paths.flatten(tree), options | {"recipe": recipe.to_json()})
        with commit.pending_directory(
            dst, overwrite=overwrite, keep_unfinished=True, needed_bytes=job.total
        ) as folder:
            entries = _write(job, folder, method=method, compat=compat, progress=progress)
            manifest.write(
                Manifest(
                    kind="params" if source.config is None else "model",
                    tensors=tuple(entries),
                    scheme=saving.scheme_name(tree) or (None if scheme is None else str(recipe)),
                    config=None if source.config is None else source.config.to_dict(),
                    files=saving.copy_files(source.companions, folder),
                    provenance={
                        "source": source.name,
                        "recipe": getattr(tree, "recipe_record", None) or recipe.to_json(),
                        "versions": saving.versions(),
                        **options,
                    },
                    fdq_version=saving.versions()["fdq"],
                ),
                folder,
            )
            if job.resumed:
                # What the killed process wrote was never looked at again.
                StoredTensors(folder).verify()
    return inspect(dst)


@dataclasses.dataclass
class _OpenSource:
    """A source of floats and the abstract tree that they fill."""

    name: str
    floats: stream.FloatSource
    tree: Any
    state: list[Any]
    config: models.DecoderConfig | None = None
    companions: list[pathlib.Path] = dataclasses.field(default_factory=list)

    @property
    def has_experts(self) -> bool:
        return self.config is None or self.config.moe is not None


@dataclasses.dataclass
class _Job:
    source: _OpenSource
    tensors: list[Tensor]
    options: dict[str, Any]
    resumed: bool = False

    @property
    def total(self) -> int:
        """Bytes to be written."""
        return sum(saving.nbytes(tensor.value) for tensor in self.tensors)

    @property
    def key(self) -> str:
        """Equal for equal jobs: what is read, what is to be made of it, and by which versions."""
        tensors = [
            [tensor.path, repr(tensor.activation), repr(getattr(tensor.value, "spec", None))]
            + [
                [name, array.shape, array.dtype.name]
                for name, array in tree_paths.arrays_of(tensor.value).items()
            ]
            for tensor in self.tensors
        ]
        content = [self.source.state, tensors, self.options, saving.versions()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class OrbaxSource:
    """The float tensors of an Orbax tree, below a prefix and without nnx.State's ``value`` keys.

    Attributes:
      tree: nested dicts of ``jax.ShapeDtypeStruct``.
    """

    def __init__(self, folder: pathlib.Path, subtree: str | None = None):
        self._reader = orbax_store.TreeReader(folder)
        prefix = tuple(subtree.split(".")) if subtree else ()
        stored = {
            path[len(prefix) :]: path
            for path in self._reader.metadata
            if path[: len(prefix)] == prefix and len(path) > len(prefix)
        }
        if not stored:
            tops = sorted({path[0] for path in self._reader.metadata})
            raise CheckpointError(
                f"{folder}: nothing below {subtree!r}; the tree has {', '.join(tops)}."
            )
        if all(path[-1] == "value" and len(path) > 1 for path in stored):
            stored = {path[:-1]: full for path, full in stored.items()}
        self._stored = stored
        self.tree = tree_paths.nested(
            {path: self._reader.metadata[full] for path, full in stored.items()}
        )
        self._last: tuple[Path, np.ndarray] | None = None

    def read(self, path: Path, index: int | None = None) -> np.ndarray:
        """The tensor at `path`, or ``tensor[index]`` (the tensor is kept for the next index)."""
        if self._last is None or self._last[0] != path:
            self._last = None
            if path not in self._stored:
                raise stream.needs_calibration(path)
            full = self._stored[path]
            self._last = (path, self._reader.read([full])[full])
        return self._last[1] if index is None else self._last[1][index]


@contextlib.contextmanager
def _opened(
    src: pathlib.Path, *, dtype: Any, config: models.DecoderConfig | None, subtree: str | None
) -> Iterator[_OpenSource]:
    if os.path.lexists(src / manifest.FILE_NAME):
        stored = StoredTensors(src)
        if any(entry.spec is not None for entry in stored.manifest.tensors):
            raise CheckpointError(
                f"{src}: quantized already ({stored.manifest.scheme}). Convert the original."
            )
        if stored.manifest.config is not None:
            config = stored_config(stored)
        source = _orbax(src / manifest.WEIGHTS, src.name, config, subtree, dtype)
        source.companions = [src / name for name in stored.manifest.files]
        yield source
    elif orbax_store.is_orbax(src):
        yield _orbax(src, src.name, config, subtree, dtype)
    elif orbax_store.steps(src):
        raise CheckpointError(
            f"{src}: holds steps {', '.join(orbax_store.steps(src)[-5:])}. Give the directory of "
            "one of them."
        )
    else:
        if config is not None or subtree is not None:
            raise CheckpointError(f"{src}: config= and subtree= are for Orbax checkpoints.")
        with SourceDirectory(src) as directory:
            source = stream.open_model(directory, dtype)
            yield _OpenSource(
                name=src.resolve().name,
                floats=source,
                tree=source.model,
                state=_file_states(src, "*"),
                config=source.config,
                companions=directory.companions(),
            )


def _orbax(
    folder: pathlib.Path,
    name: str,
    config: models.DecoderConfig | None,
    subtree: str | None,
    dtype: Any,
) -> _OpenSource:
    floats = OrbaxSource(folder, subtree)
    tree: Any = floats.tree
    if config is not None:
        tree = models.abstract(config, dtype)
        config = tree.config
        found = {tensor.path: tensor.value.shape for tensor in tree_paths.flatten(floats.tree)}
        expected = {tensor.path: tensor.value.shape for tensor in tree_paths.flatten(tree)}
        tree_paths.check_same_paths(expected=expected, found=found, what=str(folder))
        for path, shape in expected.items():
            if found[path] != shape:
                raise CheckpointError(
                    f"{folder}: {tree_paths.dotted(path)} has shape {found[path]}, expected "
                    f"{shape} from the config."
                )
    elif dtype is not None:
        raise CheckpointError(f"{folder}: dtype= is for models; a tree keeps its dtypes.")
    state = [subtree, *_file_states(folder, "**/*")]
    return _OpenSource(name, floats, tree, state, config)


def _file_states(folder: pathlib.Path, pattern: str) -> list[Any]:
    """Where, names, sizes and times of all files: equal as long as nobody touched the source."""
    states: list[Any] = [str(folder.resolve())]
    for path in sorted(folder.glob(pattern)):
        if path.is_file():
            status = path.stat()
            states.append([str(path.relative_to(folder)), status.st_size, status.st_mtime_ns])
    return states


def _write(
    job: _Job,
    folder: pathlib.Path,
    *,
    method: str | None,
    compat: str | None,
    progress: stream.Progress | None,
) -> list[TensorEntry]:
    """Write all tensors, going on after what the journal says was written."""
    weights = folder / manifest.WEIGHTS
    journal = folder / _JOURNAL
    done, batches = _read_journal(journal, job.key)
    job.resumed = bool(done) and orbax_store.keep_only(weights, batches)
    if not job.resumed:
        done = []
        commit.empty(folder)
        _append(journal, {"key": job.key})
    fresh: list[TensorEntry] = []

    def record(names: list[str]) -> None:
        _append(
            journal,
            {"batches": names, "tensors": [manifest.tensor_to_json(entry) for entry in fresh]},
        )
        fresh.clear()

    writer = orbax_store.TreeWriter(weights, total_bytes=job.total, on_batch=record)
    entries = {entry.path: entry for entry in done}
    for tensor in stream.quantized(
        job.source.floats,
        job.tensors,
        method=method,
        compat=compat,
        progress=progress,
        skip=frozenset(entries),
    ):
        entry = saving.write_tensor(writer, tensor)
        entries[entry.path] = entry
        fresh.append(entry)
        writer.flush_if_full()
    writer.finalize()
    journal.unlink()
    return [entries[tensor.path] for tensor in job.tensors]


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
    entries = [
        manifest.tensor_from_json(entry, str(journal))
        for line in lines[1:]
        for entry in line["tensors"]
    ]
    return entries, lines[-1].get("batches", [])
