"""`save`: a model or any pytree as an fdq checkpoint."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fdq
from fdq import models
from fdq.formats.folded import FoldedWeight
from fdq.sharding.distribution import unshard
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.file_names import companion_name, companion_names
from fdq_checkpoints.store import adapters, commit, manifest, orbax_store, processes, stopping
from fdq_checkpoints.store.adapters import Parts
from fdq_checkpoints.store.manifest import WEIGHTS, ArrayEntry, Manifest, TensorEntry
from fdq_checkpoints.tree_paths import Tensor


def save(
    obj: Any,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    files: Iterable[str | os.PathLike[str]] = (),
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """What `fdq.save` does and says."""
    if isinstance(obj, models.Decoder):
        obj = unshard(obj)  # as on one device: it restores on any mesh
    tensors = tree_paths.flatten(obj)
    if not tensors:
        raise CheckpointError(f"{type(obj).__name__} has no arrays to save.")
    for tensor in tensors:
        for array in tree_paths.arrays_of(tensor.value).values():
            if isinstance(array, jax.ShapeDtypeStruct):
                raise CheckpointError(
                    f"{tree_paths.dotted(tensor.path)}: abstract, it has no values to save."
                )
    is_model = isinstance(obj, models.Decoder)
    parts = Parts.of(obj) if is_model else None
    if parts is not None:
        tensors = [dataclasses.replace(t, path=place) for place, t in parts.base.items()]
    beside = parts.adapters if parts is not None else []
    total = sum(nbytes(tensor.value) for tensor in [*tensors, *beside])
    if not total:
        raise CheckpointError(f"{type(obj).__name__} has only empty arrays, nothing to save.")

    folder = commit.pending_path(path)

    def pending() -> processes.Directory:
        return commit.pending_directory(path, overwrite=overwrite, needed_bytes=total)

    with processes.directory_of_first(pending, folder):
        if beside:
            own = folder / adapters.FOLDER
            if processes.is_first():
                own.mkdir()
            entries = _write(own, beside)
            write_manifest(own, entries, scheme=None, config=None, files=[], provenance={})
        write_manifest(
            folder,
            _write(folder, tensors),
            scheme=scheme_name(obj),
            config=obj.config if is_model else None,
            files=[*attached_files(obj), *files],
            provenance=history(obj, None) | dict(provenance or {}),
        )


def _write(folder: pathlib.Path, tensors: list[Tensor]) -> list[TensorEntry]:
    return write(folder, tensors, sum(nbytes(tensor.value) for tensor in tensors))


def write(folder: pathlib.Path, tensors: Iterable[Tensor], total: int) -> list[TensorEntry]:
    """Writes tensors of `total` bytes, of which each process may have a part, to `weights/`."""
    writer = orbax_store.TreeWriter(folder / WEIGHTS, total_bytes=total)
    entries = []
    try:
        for tensor in tensors:
            entries.append(write_tensor(writer, processes.gathered(tensor)))
            writer.flush_if_full()
        writer.finalize()
    finally:
        with stopping.whole():
            writer.close()
    return entries


def history(obj: Any, recipe: str | None) -> dict[str, Any]:
    """What a model knows of how it was made; `recipe` where it does not know that."""
    prepared = getattr(obj, "prepared", None)
    said = {"recipe": getattr(obj, "recipe_record", None) or recipe}
    return said if prepared is None else {**said, "prepared": prepared}


def text_seen(seen: Any) -> dict[str, Any]:
    """On which text the statistics were gathered that quantizers were given."""
    if seen is None:
        return {}
    return {"calibration_tokens": seen.tokens, "calibration_sample": seen.sample or None}


def write_manifest(
    folder: pathlib.Path,
    entries: Iterable[TensorEntry],
    *,
    scheme: str | None,
    config: models.DecoderConfig | None,
    files: Iterable[str | os.PathLike[str]],
    provenance: Mapping[str, Any],
) -> None:
    """Copy `files` beside the weights in `folder`, and describe all that is there.

    Of several processes the first does it.
    """
    if not processes.is_first():
        return
    content = Manifest(
        kind="params" if config is None else "model",
        tensors=tuple(entries),
        scheme=scheme,
        config=None if config is None else config.to_dict(),
        files=_copy_files(files, folder),
        provenance={"versions": versions(), **provenance},
        fdq_version=versions()["fdq"],
    )
    manifest.write(content, folder)


def write_tensor(writer: orbax_store.TreeWriter, tensor: Tensor) -> TensorEntry:
    """Hand a tensor's arrays to the writer and describe them."""
    arrays: dict[str, ArrayEntry] = {}
    prng = None
    for name, array in tree_paths.arrays_of(tensor.value).items():
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            prng = str(jax.random.key_impl(array))
            array = jax.random.key_data(array)
        host = np.asarray(array)
        arrays[name] = ArrayEntry(host.dtype.name, host.shape, manifest.checksum(host))
        if host.size:  # Orbax has no empty arrays; the manifest's shape says all about them
            writer.add(tree_paths.array_path(tensor.path, name), host)
    value, shape = tensor.value, tuple(tensor.value.shape)
    quantized = isinstance(value, tree_paths.QUANTIZED)
    spec, padding = (value.spec, value.padding) if quantized else (None, 0)
    fold = value.fold if isinstance(value, FoldedWeight) else None
    return TensorEntry(tensor.path, shape, arrays, spec, padding, tensor.activation, prng, fold)


def nbytes(value: Any) -> int:
    """Bytes of a tensor's arrays, abstract or not."""
    total = 0
    for array in tree_paths.arrays_of(value).values():
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            array = jax.eval_shape(jax.random.key_data, array)
        total += int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
    return total


def _copy_files(
    paths: Iterable[str | os.PathLike[str]], folder: pathlib.Path
) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path in map(pathlib.Path, paths):
        name = companion_name(path)
        if name in entries or name in (manifest.FILE_NAME, WEIGHTS, adapters.FOLDER):
            raise CheckpointError(f"{path}: a second file of this name in the checkpoint.")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
        entries[name] = {"bytes": path.stat().st_size, "sha256": commit.file_digest(path)}
    return entries


def versions() -> dict[str, str]:
    """Versions of fdq and of what it stands on."""
    installed = {name: _version(name) for name in ("jax", "flax", "orbax-checkpoint")}
    # Not asked of the installation: another project's distribution is called fdq.
    return {"fdq": fdq.__version__} | installed


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a source tree without installing
        return "unknown"


def scheme_name(obj: Any) -> str | None:
    """The scheme that `fdq.quantize` recorded on a model."""
    scheme = getattr(obj, "scheme", None)
    return None if scheme is None else str(scheme)


def attached_files(obj: Any) -> list[pathlib.Path]:
    """Tokenizer and config files of the checkpoint that a model came from, if still there."""
    tokenizer = getattr(obj, "tokenizer_path", None)
    if not isinstance(tokenizer, str):
        return []
    folder = pathlib.Path(tokenizer).parent
    return [folder / name for name in companion_names(folder) if (folder / name).is_file()]
