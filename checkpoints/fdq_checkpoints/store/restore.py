"""Reading the tensors of an fdq checkpoint: compared with the manifest before and after.

Each device takes its own part: the sharding need not be the one of writing.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq import models
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError, nearest
from fdq_checkpoints.store import manifest as manifests
from fdq_checkpoints.store import processes
from fdq_checkpoints.store.commit import file_digest
from fdq_checkpoints.store.host_memory import Trimmer
from fdq_checkpoints.store.manifest import WEIGHTS, ArrayEntry, Manifest, TensorEntry
from fdq_checkpoints.store.orbax_store import TreeReader
from fdq_checkpoints.tree_paths import Path, array_path, dotted

# What is read at once: each reading costs Orbax some 20 ms, and what it reads is in memory twice
# until it is on its device.
MIN_BATCH_BYTES, MAX_BATCH_BYTES, BATCHES = 16 * 2**20, 128 * 2**20, 64

# Smaller arrays every process reads whole.
MIN_PART_BYTES = 2**16

# Where to put an array: one sharding for all, by the array's dotted path, or a function of that
# path and the abstract array. None is the default device.
_PARTS_OF_SHARDINGS = (jax.sharding.Mesh, jax.sharding.AbstractMesh, jax.sharding.PartitionSpec)
_NO_SHARDING = "expected jax.sharding.NamedSharding(mesh, PartitionSpec(...)), found {}."

Shardings = (
    jax.sharding.Sharding
    | Mapping[str, jax.sharding.Sharding]
    | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None]
    | None
)


class StoredTensors:
    """The tensors of an fdq checkpoint, whose manifest is checked against what Orbax has stored."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.manifest: Manifest = manifests.read(folder)
        self._check_data()
        self._reader = TreeReader(folder / WEIGHTS)
        self._check_stored()

    def config(self) -> models.DecoderConfig:
        """The config of the stored model; CheckpointError where this fdq does not know it."""
        try:
            return models.DecoderConfig.from_dict(self.manifest.config or {})
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.folder}: config in fdq.json: {error}") from error

    def read(self, *, verify: bool = True) -> Iterator[tuple[TensorEntry, dict[str, np.ndarray]]]:
        """Each tensor's entry and arrays on the host; comparing checksums takes 1 s per 1.4 GB."""
        for batch in self._batches():
            stored = self._reader.read(_stored_arrays(batch))
            for entry in batch:
                yield entry, self._arrays(entry, stored, verify)

    def read_one(self, entry: TensorEntry, *, verify: bool = True) -> dict[str, np.ndarray]:
        """The arrays of one tensor, on the host."""
        return self._arrays(entry, self._reader.read(_stored_arrays([entry])), verify)

    def _arrays(
        self, entry: TensorEntry, stored: dict[Path, np.ndarray], verify: bool
    ) -> dict[str, np.ndarray]:
        """Takes those of one tensor out of `stored`; adds those that are empty."""
        arrays = {}
        for name, array in entry.arrays.items():
            path = array_path(entry.path, name)
            empty = np.empty(array.shape, jnp.dtype(array.dtype))
            arrays[name] = stored.pop(path) if array.nbytes else empty
            if verify and manifests.checksum(arrays[name]) != array.crc32:
                raise CheckpointError(
                    f"{self.folder}: {dotted(path)}: the checksum of its data is not the one in "
                    "fdq.json: the file has been damaged. Copy or convert the checkpoint again."
                )
        return arrays

    @property
    def has_file_checksums(self) -> bool:
        """Whether all files of data have one: those of the first versions have none."""
        return all(file.crc32 is not None for file in self.manifest.data.values())

    def restore_parts(
        self,
        place: Callable[[str, Any], Any],
        parts: Callable[[str, Any], Mapping[str, jax.sharding.Sharding]],
        *,
        verify: bool = True,
    ) -> dict[Path, Any]:
        """`restore` by several processes, each of which reads what its devices need.

        `parts(dotted path, abstract tensor)` are shardings that arrays can be read to, by name.
        What is compared are checksums of files, where they have some: each process reads some once.
        """
        if verify:
            processes.checked(self._file_problem, self.folder)
        result, memory = {}, Trimmer()
        for batch in self._batches():
            wanted: dict[Path, jax.sharding.Sharding] = {}
            for entry in batch:
                for name, where in parts(dotted(entry.path), entry.abstract()).items():
                    if entry.arrays[name].nbytes >= MIN_PART_BYTES:
                        wanted[array_path(entry.path, name)] = where
            stored = self._reader.read(_stored_arrays(batch), wanted)
            for entry in batch:
                arrays: dict[str, Any] = dict(self._arrays(entry, stored, verify=False))
                if entry.prng is not None:
                    key = jnp.asarray(arrays["value"])
                    arrays["value"] = jax.random.wrap_key_data(key, impl=entry.prng)
                held = tree_paths.with_arrays(entry.abstract(), arrays)
                # One after the other: what is on its way twice is no more than a tensor.
                result[entry.path] = jax.block_until_ready(place(dotted(entry.path), held))
                del arrays, held
                memory.worked(entry.nbytes)
        return result

    def _file_problem(self) -> None:
        """CheckpointError for a damaged file, of those that are this process's to look at."""
        files = sorted(self.manifest.data.items(), key=lambda item: (-item[1].bytes, item[0]))
        for name, file in files[jax.process_index() :: jax.process_count()]:
            path = self.folder / WEIGHTS / name
            if file.crc32 is not None and manifests.file_checksum(path) != file.crc32:
                raise CheckpointError(
                    f"{path}: its checksum is not the one in fdq.json: the file has been damaged. "
                    "Copy or convert the checkpoint again."
                )

    def restore(
        self,
        sharding: Shardings = None,
        *,
        verify: bool = True,
        paths: Mapping[Path, Path] | None = None,
        place: Callable[[str, Any], Any] | None = None,
    ) -> dict[Path, Any]:
        """All tensors on devices, by path: arrays, PRNG keys and QTensors.

        `paths` are those that the shardings know the tensors by, where they are not the stored;
        `place(dotted path, tensor on the host)` puts them there instead of shardings.
        """
        result, memory = {}, Trimmer()
        for entry, arrays in self.read(verify=verify):
            path = entry.path if paths is None else paths[entry.path]
            if place is not None and entry.prng is None:
                held = tree_paths.with_arrays(entry.abstract(), arrays)
                result[entry.path] = place(dotted(path), held)
                del arrays, held
                memory.worked(entry.nbytes)
                continue
            placed = {
                name: put(array, sharding_of(sharding, array_path(path, name), array))
                for name, array in arrays.items()
            }
            if entry.prng is not None:
                placed["value"] = jax.random.wrap_key_data(placed["value"], impl=entry.prng)
            result[entry.path] = tree_paths.with_arrays(entry.abstract(), placed)
            del arrays, placed
            memory.worked(entry.nbytes)
        return result

    def verify(self) -> None:
        """Compare all checksums; CheckpointError names the first thing missing or changed."""
        memory = Trimmer()
        for entry, _ in self.read(verify=True):
            memory.worked(entry.nbytes)
        # What no array is in, too: a reader of tomorrow may look at it.
        for name, file in self.manifest.data.items():
            path = self.folder / WEIGHTS / name
            if file.crc32 is not None and manifests.file_checksum(path) != file.crc32:
                raise CheckpointError(
                    f"{path}: changed since the checkpoint was written. Copy or convert the "
                    "checkpoint again."
                )
        for name, expected in self.manifest.files.items():
            path = self.folder / name
            if file_digest(path) != expected["sha256"]:
                raise CheckpointError(f"{path}: changed since the checkpoint was written.")

    def _batches(self) -> Iterator[list[TensorEntry]]:
        total = sum(entry.nbytes for entry in self.manifest.tensors)
        limit = min(max(MIN_BATCH_BYTES, total // BATCHES), MAX_BATCH_BYTES)
        batch: list[TensorEntry] = []
        size = 0
        for entry in self.manifest.tensors:
            if batch and size + entry.nbytes > limit:
                yield batch
                batch, size = [], 0
            batch.append(entry)
            size += entry.nbytes
        if batch:
            yield batch

    def _check_data(self) -> None:
        """Missing and truncated files are found here, before Orbax reads on several threads."""
        weights = self.folder / WEIGHTS
        if not weights.is_dir():
            raise CheckpointError(f"{weights}: missing. Copy or convert the checkpoint again.")
        for name in self.manifest.files:
            if not (self.folder / name).is_file():
                raise CheckpointError(
                    f"{self.folder / name}: missing, though fdq.json lists it. Copy it back, or "
                    "convert the checkpoint again."
                )
        for name, file in self.manifest.data.items():
            path, size = weights / name, file.bytes
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "missing" if found is None else f"{found:,} bytes"
                raise CheckpointError(
                    f"{path}: {state}, expected {size:,} bytes. Copy or convert the checkpoint "
                    "again."
                )

    def _check_stored(self) -> None:
        """Orbax casts to what is asked for, so dtypes and shapes are compared before reading."""
        expected = _stored_arrays(self.manifest.tensors)
        stored = self._reader.metadata
        where = f"{self.folder / WEIGHTS}"
        for path, array in expected.items():
            if path not in stored:
                raise CheckpointError(
                    f"{where} has no readable array {dotted(path)}, which fdq.json lists; files "
                    "are missing or damaged. Copy or convert the checkpoint again."
                )
            found = stored[path]
            if (np.dtype(found.dtype).name, found.shape) != (array.dtype, array.shape):
                raise CheckpointError(
                    f"{where}: {dotted(path)} is {found.dtype} {found.shape}, fdq.json says "
                    f"{array.dtype} {array.shape}."
                )
        if extra := stored.keys() - expected.keys():
            raise CheckpointError(f"{where}: {dotted(min(extra))} is not in fdq.json.")


def _stored_arrays(entries: Iterable[TensorEntry]) -> dict[Path, ArrayEntry]:
    """By path, those of some tensors that are not empty: Orbax has no others."""
    return {
        array_path(entry.path, name): array
        for entry in entries
        for name, array in entry.arrays.items()
        if array.nbytes
    }


def sharding_of(
    shardings: Shardings, path: Path, array: np.ndarray
) -> jax.sharding.Sharding | None:
    """The sharding of one array; CheckpointError where it does not fit it."""
    if shardings is None:
        return None
    if isinstance(shardings, jax.sharding.Sharding):
        found = shardings
    elif isinstance(shardings, Mapping):
        found = shardings.get(dotted(path))
    else:
        found = shardings(dotted(path), jax.ShapeDtypeStruct(array.shape, array.dtype))
    if found is None:
        return None
    if not isinstance(found, jax.sharding.Sharding):
        raise CheckpointError(f"sharding of {dotted(path)}: {_NO_SHARDING.format(found)}")
    try:
        found.shard_shape(array.shape)
    except (ValueError, IndexError, TypeError) as error:
        hint = ""
        if found is shardings:
            hint = "; give a function (path, array) -> sharding, or a mapping by path"
        raise CheckpointError(
            f"sharding of {dotted(path)}, {array.dtype} {list(array.shape)}: {found} does not fit "
            f"it ({str(error).splitlines()[0] if str(error) else type(error).__name__}){hint}."
        ) from None
    return found


def check_shardings(shardings: Shardings, arrays: Iterable[tuple[Path, Mapping[str, Any]]]) -> None:
    """Raises CheckpointError for what gives no shardings, or not of arrays that there are."""
    is_function = callable(shardings) and not isinstance(shardings, _PARTS_OF_SHARDINGS)
    kinds = (jax.sharding.Sharding, Mapping)
    if shardings is not None and not isinstance(shardings, kinds) and not is_function:
        raise CheckpointError(f"sharding: {_NO_SHARDING.format(shardings)}")
    if isinstance(shardings, Mapping):
        known = {dotted(array_path(path, name)) for path, names in arrays for name in names}
        for name in shardings:
            if name not in known:
                raise CheckpointError(f"sharding: there is no array {name}.{nearest(name, known)}")


def put(value: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A host array on devices; each device (and process) takes its own part only.

    What JAX would cut to 32 bits (unless `jax_enable_x64`) stays a NumPy array.
    """
    if isinstance(value, jax.Array) and sharding is None:
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):  # a PRNG key
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    if jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype:
        return host
    if sharding is None:
        return jnp.asarray(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
