"""`convert`: a float checkpoint to a quantized fdq checkpoint, tensor by tensor.

Peak memory is about the largest quantized tensor (the experts of a layer are one) plus a batch. A
conversion that is stopped by whatever (an interrupt, a kill, an error, a full disk) leaves
`<destination>.fdq-tmp`, which nothing loads; the same call goes on from there, and another one
(other source, scheme, options or version) is refused unless it may overwrite that.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fdq.schemes.recipe import Recipe
from fdq_checkpoints import joint_conversion, saving, stream, tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.inspection import Inspection, inspect
from fdq_checkpoints.readers.local_directory import tell_of_sentencepiece
from fdq_checkpoints.sources import open_source
from fdq_checkpoints.store import adapters, commit, manifest, orbax_store, processes, stopping
from fdq_checkpoints.store import journal as journals
from fdq_checkpoints.store.journal import Journal, Pieces
from fdq_checkpoints.store.manifest import TensorEntry
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.tree_paths import Tensor

# A kill loses no more than the work of so many seconds (and the matrix that is being made, of
# quantizers that need all its columns at once).
FLUSH_SECONDS = 5.0

_LOGGER = logging.getLogger("fdq")


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
    destination = pathlib.Path(dst).absolute()
    check, folder = commit.check_destination, pathlib.Path(src)
    processes.checked(lambda: check(destination, overwrite=overwrite, source=folder), destination)
    open_it = functools.partial(open_source, src, dtype=dtype, config=config, subtree=subtree)
    given = {"method": method, "compat": compat, "calibration": calibration}
    if jax.process_count() > 1:
        how = {"verbose": verbose, "progress": progress}
        joint_conversion.convert(open_it, destination, scheme, overwrite, given, **how)
        return inspect(dst)
    with open_it() as source:
        if source.config is not None:
            tell_of_sentencepiece(source.folder)
        made = stream.Job.of(source, scheme, **given, progress=progress)
        if made.assigned is not None:
            made.assigned.table.report(verbose=verbose)
        recipe = Recipe() if made.assigned is None else made.assigned.recipe
        seen = made.inputs.calibration
        options = {"scheme": None if scheme is None else str(scheme), **given}
        options["calibration"] = None if seen is None else seen.digest
        tensors = tree_paths.flatten(made.tree)
        job = {"source": source.identity, **options, "versions": saving.versions()}
        key = _key(made, tensors, job | {"recipe": recipe.to_json()})
        work = _Work(made, tensors, destination, key, job)
        with (
            work.told(),
            stopping.stoppable(),
            commit.pending_directory(
                dst,
                overwrite=overwrite,
                keep=work.is_of_use,
                needed_bytes=work.nbytes,
                notes=journals.NOTES,
            ) as folder,
        ):
            written, resumed = work.write(overwrite, progress)
            # A model keeps its own record, also of what was quantized before.
            record = saving.history(made.tree, recipe.to_json())
            origin = {"source": source.name, **record, **options, **saving.text_seen(seen)}
            saving.write_manifest(
                folder,
                [written[tensor.path] for tensor in tensors],
                scheme=saving.scheme_name(made.tree) or (None if scheme is None else str(recipe)),
                config=source.config,
                files=source.companions(),
                provenance=origin,
            )
            if source.adapters is not None:
                shutil.copytree(source.adapters, folder / adapters.FOLDER, dirs_exist_ok=True)
            if resumed:
                # What the killed process wrote was never looked at again.
                work.verify()
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
    return hashlib.sha256(json.dumps([described, options]).encode()).hexdigest()


class _Work:
    """The writing of all tensors, which an earlier process may have begun."""

    def __init__(
        self,
        made: stream.Job,
        tensors: list[Tensor],
        dst: pathlib.Path,
        key: str,
        job: dict[str, Any],
    ):
        self._made, self._key, self._job = made, key, job
        self._destination = dst
        self._folder = commit.pending_path(dst)
        self._journal: Journal | None = None
        self._refused = self._spoiled = False
        self._files: set[pathlib.Path] = set()  # of the tensors since the last part
        self._known = {tensor.path for tensor in tree_paths.flatten(made.source.tree)}
        self._tensors = {tensor.path: tensor.value for tensor in tensors}
        self._sizes = {path: saving.nbytes(value) for path, value in self._tensors.items()}
        self.nbytes = sum(self._sizes.values())

    def is_of_use(self) -> bool:
        """Whether there is something to go on from."""
        if self._journal is None:  # not read yet: nobody knows what it holds
            return (self._folder / journals.FILE_NAME).is_file()
        if self._spoiled:
            return False
        weights = self._folder / manifest.WEIGHTS
        there = set(orbax_store.pending_directories(weights))
        whole = self._journal.has_work and set(self._journal.batches) <= there
        return self._journal.finished or weights.is_dir() or whole

    def verify(self) -> None:
        """Compares all checksums; what does not match is not kept."""
        try:
            StoredTensors(self._folder).verify()
        except CheckpointError:
            self._spoiled = True
            raise

    def _owns(self) -> bool:
        """Whether what is there is of this job."""
        return self._journal is not None and self._journal.is_of(self._key)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Says with whatever ends it before its time what is kept, and how to go on."""
        try:
            yield
        except KeyboardInterrupt as error:
            number = getattr(error, "number", signal.SIGINT)
            raise stopping.Stopped(self._kept(), number=number) from None
        except BaseException as error:
            if self.is_of_use() and self._owns() and not self._refused:
                error.add_note(self._kept())
            raise

    def write(
        self, overwrite: bool, progress: stream.Progress | None
    ) -> tuple[dict[tree_paths.Path, TensorEntry], bool]:
        """By path what was written, and whether an earlier process wrote some."""
        weights = self._folder / manifest.WEIGHTS
        journal = self._begin(weights, overwrite)
        resumed = journal.has_work
        entries = {entry.path: entry for entry in journal.done}
        if journal.finished:
            return entries, True
        if resumed:
            _LOGGER.warning("%s: going on, %s.", self._destination, self._amount())

        def keep() -> None:
            with stopping.whole():
                pieces.drop_done()
                pieces.flush(self._waiting(*writer.waiting()))

        writer = orbax_store.TreeWriter(weights, total_bytes=self.nbytes, on_batch=journal.add)
        pieces = Pieces(self._folder, journal, seconds=FLUSH_SECONDS, keep=keep)
        self._pieces = pieces

        def make_room(tensor: Tensor) -> None:
            with stopping.whole():
                writer.make_room(self._sizes[tensor.path])

        try:
            skip = frozenset(entries)
            for tensor in self._made.tensors(
                progress=progress, skip=skip, pieces=pieces, before=make_room
            ):
                with stopping.whole():
                    self._part_files(tensor.path, writer)
                    entry = saving.write_tensor(writer, tensor)
                    entries[entry.path] = entry
                    writer.note(entry)
                    writer.flush_if_full()
            with stopping.whole():
                writer.finalize()
                pieces.drop_done()
                journal.finish()
        except BaseException:
            if not journal.finished:
                # Of a full disk, say, that fails once more; the first error is the one to tell.
                with (
                    contextlib.suppress(KeyboardInterrupt, CheckpointError, OSError),
                    stopping.whole(),
                ):
                    pieces.drop_done()  # makes room
                    writer.flush()
                    pieces.drop_done()
                    pieces.flush()
            raise
        finally:
            with stopping.whole():
                writer.close()
        return entries, resumed

    def _waiting(
        self, entries: list[TensorEntry], arrays: Mapping[tree_paths.Path, np.ndarray]
    ) -> Iterator[tuple[tree_paths.Path, tuple[int, ...], dict[str, np.ndarray]]]:
        """Whole tensors that are in no batch yet."""
        for entry in entries:
            places = {name: tree_paths.array_path(entry.path, name) for name in entry.arrays}
            if entry.prng is None and all(p in arrays for p in places.values()):
                shape = tuple(self._tensors[entry.path].shape)
                yield entry.path, shape, {name: arrays[place] for name, place in places.items()}

    def _part_files(self, path: tree_paths.Path, writer: orbax_store.TreeWriter) -> None:
        """A batch holds what comes of several shards only where a tensor does.

        So one that changes spoils few of them.
        """
        if path not in self._known:
            return
        files = set(self._made.source.files_of(path)) - self._common
        if files and self._files.isdisjoint(files):
            writer.part()
            self._files = files
        self._files = self._files | files

    @functools.cached_property
    def _common(self) -> set[pathlib.Path]:
        """Files that every tensor comes of: the config, or the only shard."""
        return set.intersection(*(set(self._made.source.files_of(path)) for path in self._known))

    def _begin(self, weights: pathlib.Path, overwrite: bool) -> Journal:
        """What there is of this job; of another, refused or dropped."""
        journal = self._journal = self._read(overwrite)
        self._pieces = Pieces(self._folder, journal)
        states = self._made.source.states()
        if journal.is_of(self._key):
            changed = {name for name, state in journal.files.items() if states.get(name) != state}
            # It appears when it is whole.
            complete = weights.is_dir() and len(journal.done) == len(self._sizes)
            if complete and not journal.finished and not changed:
                orbax_store.drop_batches(weights)
                self._pieces.drop_done()
                journal.finish()
            usable = journal.finished and weights.is_dir()
            if not changed and (
                usable or (journal.has_work and orbax_store.keep_only(weights, journal.batches))
            ):
                return journal
            if changed and not journal.finished and self._drop(journal, changed, weights, states):
                return journal
            reason = f"{min(changed)} of the source has changed" if changed else ""
        else:
            reason = _difference(journal.job, self._job)
        if journal.has_work and reason and not overwrite:
            self._refused = True
            raise FileExistsError(
                f"{self._folder}: holds {len(self._finished(journal))} finished tensors of a "
                f"conversion that was stopped, and cannot be gone on with: {reason}. Repeat the "
                "call that was stopped, choose another destination, or drop them with "
                "overwrite=True (--overwrite)."
            )
        if journal.has_work:
            why = reason or "batches that were written are missing"
            _LOGGER.warning("%s: starting anew: %s.", self._destination, why)
        commit.empty(self._folder)
        journal.begin(self._key, self._job, states)
        return journal

    def _read(self, overwrite: bool) -> Journal:
        """The journal; FileExistsError where another version of fdq wrote it, say."""
        path = self._folder / journals.FILE_NAME
        try:
            return Journal(path)
        except (CheckpointError, KeyError, TypeError, AttributeError) as error:
            if not overwrite:
                self._refused = True
                raise FileExistsError(
                    f"{path}: cannot be read ({' '.join(str(error).split())[:200]}), so that it is "
                    "not known what was kept. Go on with the fdq that wrote it, choose another "
                    "destination, or drop it with overwrite=True (--overwrite)."
                ) from error
        commit.empty(self._folder)
        return Journal(path)

    def _drop(
        self,
        journal: Journal,
        changed: set[str],
        weights: pathlib.Path,
        states: dict[str, list[int]],
    ) -> bool:
        """Forgets the batches that changed files have a part in; False where none is left."""
        source = self._made.source

        def is_stale(path: tree_paths.Path) -> bool:
            if path not in self._known:
                return False
            names = {source.key_of(file) for file in source.files_of(path)}
            return not names.isdisjoint(changed)

        before, there = len(journal.done), orbax_store.pending_directories(weights)
        if not journal.forget(is_stale) or not set(journal.batches) <= set(there):
            return False
        # Before what it named is dropped: a process that is killed here goes on all the same.
        journal.write_again(self._key, self._job, states)
        orbax_store.keep_only(weights, journal.batches)
        _LOGGER.warning(
            "%s: %s of the source has changed; %d tensors made of it are made again.",
            self._destination,
            ", ".join(sorted(changed)),
            before - len(journal.done),
        )
        return True

    def _amount(self) -> str:
        journal = self._journal
        assert journal is not None
        kept, part = self._finished(journal), ""
        for path, stop in self._pieces.columns().items():
            shape = self._tensors[path].shape
            if path in kept:
                continue
            if len(shape) > 2:
                part = f" and {stop // shape[-1]} of the {shape[0]} matrices of the next"
            else:
                part = f" and {stop / shape[-1]:.0%} of the next"
        done = sum(self._sizes[path] for path in kept)
        return (
            f"kept {len(kept)} of {len(self._sizes)} tensors "
            f"({done / self.nbytes:.0%} of the bytes){part}"
        )

    def _finished(self, journal: Journal) -> set[tree_paths.Path]:
        """Tensors that are whole on disk; of another job's those that batches have."""
        pieces = self._pieces.columns().items()
        sizes = {
            p: journals.columns_of(self._tensors[p].shape) for p, _ in pieces if p in self._tensors
        }
        return {entry.path for entry in journal.done} | {p for p, n in pieces if sizes.get(p) == n}

    def _kept(self) -> str:
        if not self.is_of_use():
            return "Nothing was finished yet; the same call starts anew."
        if not self._owns():
            return f"{self._folder} is as it was."
        amount = self._amount()
        return (
            f"{amount[0].upper()}{amount[1:]} in {self._folder}. The same call goes on from there; "
            "to drop them, remove that directory."
        )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two jobs do not have in common, in words."""
    names = [name for name in now if before.get(name) != now[name]]
    if not names:
        return "it made other tensors"
    name = names[0]
    return f"its {name} was {before.get(name)!r:.200}, and is {now[name]!r:.200}"
