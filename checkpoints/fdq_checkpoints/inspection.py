"""`inspect` and `verify`: what is in a checkpoint, in true bytes."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdq.formats.qtensor import dequantize
from fdq.text_table import aligned, folded
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.source_directory import SourceDirectory
from fdq_checkpoints.sources import importer_of, open_source
from fdq_checkpoints.sources.float_model import FLOAT_MODELS
from fdq_checkpoints.sources.quantized_model import QUANTIZED_MODELS
from fdq_checkpoints.sources.quantized_release import QuantizedRelease
from fdq_checkpoints.sources.runs import checkpoint_directory
from fdq_checkpoints.store import adapters
from fdq_checkpoints.store import manifest as manifests
from fdq_checkpoints.store.commit import bytes_in, unreplaced
from fdq_checkpoints.store.restore import StoredTensors
from fdq_checkpoints.store.stored_model import prepared_of
from fdq_checkpoints.tree_paths import dotted


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor; `format` is the spec's short name (`W4`), or the dtype of a plain array.

    `weights` is their number where the shape does not say it: of codes packed by other tools, and 0
    of the scales beside them.
    """

    path: str
    format: str
    quantized: bool
    shape: tuple[int, ...]
    nbytes: int
    weights: int | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape) if self.weights is None else self.weights

    @property
    def bits_per_weight(self) -> float:
        """Stored bits by weight."""
        return 8 * self.nbytes / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint's table; prints itself.

    Attributes:
      path: of the checkpoint.
      kind: `"model"`, `"params"`, `"float model"` (a Hugging Face or Paddle directory), `"model
        quantized by another tool"`, or the name of another importer.
      scheme: its name, if quantized; of another tool's model that tool and its bits.
      rows: one a tensor.
      disk_bytes: of all files, metadata and tokenizer included.
      verified: whether all checksums were compared (and matched).
      provenance: where the weights came from.
      advice: what fdq can do with another tool's model.
    """

    path: str
    kind: str
    scheme: str | None
    rows: tuple[Row, ...]
    disk_bytes: int
    verified: bool = False
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    advice: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.nbytes for row in self.rows)

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(row.size for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Over the quantized tensors; None if there are none."""
        rows = [row for row in self.rows if row.quantized]
        size = sum(row.size for row in rows)
        return 8 * sum(row.nbytes for row in rows) / size if size else None

    def made_how(self) -> dict[str, str]:
        """Quantizer, calibration and healing by name, in words, as far as they are on record."""
        return _made_how(self.provenance)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, totals included."""
        return dataclasses.asdict(self) | {
            "nbytes": self.nbytes,
            "size": self.size,
            "bits_per_weight": self.bits_per_weight,
            "quantized_bits_per_weight": self.quantized_bits_per_weight,
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, *, fold: bool = True) -> str:
        """The table and a line of totals; with `fold` equal layers and experts share a row."""
        rows = [
            (
                row.path,
                row.format,
                " × ".join(map(str, row.shape)) or "scalar",
                f"{row.nbytes:,}",
                f"{row.bits_per_weight:.3f}",
            )
            for row in self.rows
        ]
        head = ("tensors", "count", "format", "shape", "bytes each", "bits/weight")
        counted = folded(rows) if fold else [(1, row) for row in rows]
        cells = [head, *((path, f"{count:,}", *others) for count, (path, *others) in counted)]
        quantized = self.quantized_bits_per_weight
        total = (
            f"{self.kind}, {self.scheme or 'not quantized'}: {len(self.rows)} tensors, "
            f"{self.size:,} weights, {self.nbytes:,} bytes ({self.disk_bytes:,} on disk), "
            f"bits per weight: {self.bits_per_weight:.3f} of all"
        )
        if quantized is not None:
            total += f", {quantized:.3f} of the quantized ones"
        total += ", checksums verified" if self.verified else ", checksums not compared"
        head, *lines = aligned(cells, right={1, 4, 5}).splitlines()
        made = [f"{name}: {words}" for name, words in self.made_how().items()]
        return "\n".join([self.path, "", head, "-" * len(head), *lines, "", total, *made])


def _made_how(record: Mapping[str, Any]) -> dict[str, str]:
    made = {}
    if record.get("prepared"):
        made["prepared"] = f"{record['prepared']}: weights were changed before quantization"
    if record.get("method"):
        made["quantizer"] = str(record["method"])
    if record.get("calibration"):
        tokens, sample = record.get("calibration_tokens"), record.get("calibration_sample")
        words = f"statistics {str(record['calibration'])[:16]}"
        words += f" of {tokens:,} tokens" if isinstance(tokens, int) else ""
        made["calibration"] = words + (f", text sha256 {str(sample)[:16]}" if sample else "")
    healed = record.get("healed")
    if isinstance(healed, Mapping):
        before, after = healed.get("kl_before"), healed.get("kl_after")
        words = f"{healed.get('steps')} steps against {healed.get('teacher')}, codes "
        words += f"{healed.get('codes')}, tokens sha256 {str(healed.get('tokens_sha256'))[:16]}"
        if isinstance(before, float) and isinstance(after, float):
            words += f", KL {before:.5f} -> {after:.5f} nats per token"
        made["healed"] = words
    return made


def inspect(
    path: str | os.PathLike[str], *, verify: bool = False, subtree: str | None = None
) -> Inspection:
    """The table of an fdq checkpoint, or of any other that fdq reads.

    Args:
      path: the directory.
      verify: read all data and compare the checksums.
      subtree: of an Orbax checkpoint, only what is below this dotted path.

    Raises:
      FileNotFoundError: no such directory.
      CheckpointError: it is damaged, or no checkpoint.
    """
    return unreplaced(path, lambda: _inspect(path, verify, subtree))


def _inspect(path: str | os.PathLike[str], verify: bool, subtree: str | None) -> Inspection:
    folder = checkpoint_directory(path)
    if subtree is not None or not os.path.lexists(folder / manifests.FILE_NAME):
        return _inspect_source(folder, subtree)
    stored = StoredTensors(folder)
    if verify:
        _verify(stored)
    rows, manifest = [], stored.manifest
    for entry in manifest.tensors:
        is_quantized = entry.spec is not None
        format = str(entry.spec) if is_quantized else entry.arrays["value"].dtype
        rows.append(Row(dotted(entry.path), format, is_quantized, entry.shape, entry.nbytes))
    kind, scheme, source = manifest.kind, manifest.scheme, manifest.provenance
    return Inspection(str(folder), kind, scheme, tuple(rows), bytes_in(folder), verify, source)


def weight_errors(
    path: str | os.PathLike[str], original: str | os.PathLike[str]
) -> dict[str, tuple[float, float]]:
    """What quantization did to each weight: sums of squares of its error and of the original.

    Args:
      path: an fdq checkpoint.
      original: a checkpoint with the same tensors, in floats or quantized by another tool.

    Returns:
      By dotted path of each quantized tensor. One is in memory at a time, decoded.

    Raises:
      FileNotFoundError: no such directory.
      CheckpointError: `path` is no fdq checkpoint, or `original` is of another model.
    """
    folder = checkpoint_directory(path)
    if not os.path.lexists(folder / manifests.FILE_NAME):
        raise CheckpointError(f"{folder}: no fdq.json; errors are those of an fdq checkpoint.")
    found = {}
    stored = StoredTensors(folder)
    prepared = prepared_of(stored)
    if prepared != _prepared(original):
        raise CheckpointError(
            f"{folder}: its weights were changed before quantization ({prepared or 'nothing'}), "
            f"those of {original} otherwise ({_prepared(original) or 'nothing'}), so that they "
            "cannot be compared one by one. fdq evaluate --against compares what models say."
        )
    with open_source(original) as source:
        shapes = {t.path: tuple(t.value.shape) for t in tree_paths.flatten(source.tree)}
        for entry, arrays in stored.read(verify=False):
            if entry.spec is None:
                continue
            weight = _decoded(tree_paths.with_arrays(entry.abstract(), arrays))
            if shapes.get(entry.path) != weight.shape:
                there = shapes.get(entry.path, "no such tensor")
                raise CheckpointError(
                    f"{source.folder}: {dotted(entry.path)}: expected {weight.shape} as in "
                    f"{folder}, found {there}. Give the checkpoint that it was made of."
                )
            exact = _decoded(source.read(entry.path))
            squares = np.square(weight - exact).sum(dtype=np.float64)
            norm = np.square(exact).sum(dtype=np.float64)
            found[dotted(entry.path)] = (float(squares), float(norm))
    return found


def _prepared(path: str | os.PathLike[str]) -> str | None:
    """What was done to the weights of a checkpoint before they were stored."""
    folder = checkpoint_directory(path)
    if not os.path.lexists(folder / manifests.FILE_NAME):
        return None
    return prepared_of(StoredTensors(folder))


def _decoded(value: Any) -> np.ndarray:
    if isinstance(value, tree_paths.QUANTIZED):
        arrays = {name: jnp.asarray(array) for name, array in tree_paths.arrays_of(value).items()}
        return np.asarray(dequantize(tree_paths.with_arrays(value, arrays)))
    return np.asarray(value, np.float32)


def verify(path: str | os.PathLike[str]) -> None:
    """Compare every checksum of an fdq checkpoint, weights and files.

    Raises:
      FileNotFoundError: no such directory.
      CheckpointError: something is missing or changed; the first such thing is named.
    """
    _verify(StoredTensors(checkpoint_directory(path)))


def _verify(stored: StoredTensors) -> None:
    stored.verify()
    if (beside := adapters.of_checkpoint(stored.folder)) is not None:
        StoredTensors(beside).verify()


def _inspect_source(folder: pathlib.Path, subtree: str | None) -> Inspection:
    importer = importer_of(folder)
    problem = None
    if importer is not FLOAT_MODELS or subtree is not None:
        try:
            with open_source(folder, subtree=subtree) as source:
                rows = tuple(_row(tensor) for tensor in tree_paths.flatten(source.tree))
                path, release = source.folder, getattr(source, "release", None)
            if release is None:
                return Inspection(str(path), importer.name, None, rows, bytes_in(path))
            advice = (
                "fdq loads it as it is: fdq.load(DIR), or fdq convert DIR OUT without --scheme."
            )
            kind, size = importer.name, bytes_in(path)
            return Inspection(str(path), kind, str(release), rows, size, advice=advice)
        except CheckpointError as error:
            if importer is not QUANTIZED_MODELS:
                raise
            problem = str(error)  # its tensors can be shown all the same
    with SourceDirectory(folder) as directory:
        infos = directory.tensors.values()
        release = QuantizedRelease.of(directory.path, directory.config)
        release = release or QuantizedRelease.unnamed(directory.path, infos)
    rows = []
    for info in infos:
        weights = None if release is None else release.weights(info)
        codes = weights is not None
        rows.append(Row(info.name, info.dtype.name, codes, info.shape, info.nbytes, weights))
    size, table = bytes_in(folder), tuple(rows)
    if release is None:
        return Inspection(str(folder), "float model", None, table, size)
    kind = "model quantized by another tool"
    return Inspection(
        str(folder), kind, str(release), table, size, advice=problem or release.advice()
    )


def _row(tensor: tree_paths.Tensor) -> Row:
    value, arrays = tensor.value, tree_paths.arrays_of(tensor.value).values()
    is_quantized = isinstance(value, tree_paths.QUANTIZED)
    nbytes = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    format = str(value.spec) if is_quantized else value.dtype.name
    return Row(dotted(tensor.path), format, is_quantized, tuple(value.shape), nbytes)
