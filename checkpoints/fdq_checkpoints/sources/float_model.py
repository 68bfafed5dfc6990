"""Models of floats as Hugging Face and Paddle publish them: config.json and safetensors."""

import fnmatch
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16 by name
import numpy as np

from fdq import models
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.local_directory import tell_of_adapters
from fdq_checkpoints.readers.source_directory import INDEX_NAME, SourceDirectory
from fdq_checkpoints.sources import published_names, tensor_names
from fdq_checkpoints.sources.quantized_release import (
    SIDE_FILES,
    QuantizedRelease,
    without_quantization,
)
from fdq_checkpoints.sources.source import Source
from fdq_checkpoints.tree_paths import Path

# What reading a config raises when it holds, say, a list in place of a number.
_WRONG_KIND = (TypeError, KeyError, AttributeError, IndexError, ArithmeticError)

_LOGGER = logging.getLogger("fdq")

Parts = Mapping[Path, tensor_names.Source]
"""By target, which tensors make it."""


class FloatModel(Source):
    """A directory of floats, seen as the tensors of an fdq model."""

    concurrent = True

    def __init__(self, directory: Any, model: models.Decoder, parts: Parts):
        self.directory, self.folder = directory, directory.path
        self.tree, self.config = model, model.config
        self._parts = parts

    def read(self, path: Path, index: int | None = None) -> np.ndarray:
        """The tensor at `path`, or one expert of it, in the stored dtype."""
        return self._parts[path].read(self.directory, index)

    def has_columns(self, path: Path) -> bool:
        """Columns of a kernel are rows of what is stored."""
        return self.directory.has_rows and self._parts[path].layout == "transposed"

    def read_columns(self, path: Path, index: int | None, start: int, stop: int) -> np.ndarray:
        """Columns of a kernel, or of an expert's."""
        return self._parts[path].read_columns(self.directory, index, start, stop)

    def not_finite(self, path: Path, index: int | None) -> str | None:
        """The stored tensor, the position in it and its shard."""
        return self._parts[path].not_finite(self.directory, index)

    def weight_files(self) -> list[pathlib.Path]:
        """The shards, and what says which tensors are where."""
        names = {file for path in self._parts for file in self._files_of(path)}
        return sorted({*map(pathlib.Path, names), *self._described_by()})

    def files_of(self, path: Path) -> list[pathlib.Path]:
        """Those of its shards, and the config."""
        return sorted({*map(pathlib.Path, self._files_of(path)), *self._described_by()})

    def _files_of(self, path: Path) -> set[str]:
        parts = self._parts[path].parts
        return {file for names in parts for name in names for file in self.directory.files_of(name)}

    def _described_by(self) -> list[pathlib.Path]:
        if not self.folder.is_dir():
            return []
        names = ("config.json", INDEX_NAME, *SIDE_FILES)
        return [file for name in names if (file := self.folder / name).is_file()]

    def companions(self) -> list[pathlib.Path]:
        """The config, tokenizer and generation files that are there."""
        return self.directory.companions()

    def close(self) -> None:
        """Closes the shards."""
        self.directory.close()


class FloatModels:
    """Takes whatever no other importer claims, and refuses what is no model of floats."""

    name = "model of floats"

    def claims(self, folder: pathlib.Path) -> bool:
        """Asked last, it says no to nothing: `open` says what is wrong."""
        del folder
        return True

    def open(self, folder: pathlib.Path, *, dtype: Any = None) -> FloatModel:
        """Looks at all names, shapes and dtypes; reads no weights."""
        directory = SourceDirectory(folder)
        try:
            _refuse_quantized(directory)
            tell_of_adapters(folder)
            return FloatModel(directory, *parts_of(directory, dtype))
        except BaseException:
            directory.close()
            raise


FLOAT_MODELS = FloatModels()


def parts_of(
    directory: tensor_names.Tensors,
    dtype: Any,
    *,
    optional: tuple[str, ...] = (),
    names: published_names.Names | None = None,
) -> tuple[models.Decoder, Parts]:
    """The abstract model of a directory, and where each of its tensors comes from.

    `optional` tensors may be used or not; `names` are theirs, where it is no Hugging Face's or
    Paddle's directory.
    """
    where, hf_config = directory.path, directory.config
    if names is None:
        where = where / directory.config_name
    try:
        config = models.from_huggingface(without_quantization(hf_config))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except _WRONG_KIND as error:
        raise CheckpointError(f"{where}: a value of a wrong kind ({error}).") from error
    if config.num_layers > len(directory.tensors):  # before a model of so many is made
        raise CheckpointError(
            f"{where}: a model of {config.num_layers} layers, but there are "
            f"{len(directory.tensors)} tensors. Download the whole model again."
        )
    family = models.FAMILIES[config.model_type]
    if names is None:
        is_paddle = any(name.startswith("ernie.") for name in directory.tensors)
        names = published_names.PADDLE
        if not is_paddle:
            names = published_names.HUGGING_FACE.of_family(family, directory.tensors)
    if dtype is None and not ({"dtype", "torch_dtype"} & hf_config.keys()):
        embedding = directory.tensors.get(names.embedding)
        dtype = None if embedding is None else embedding.dtype
    try:
        model = models.abstract(config, dtype)
    except ArithmeticError as error:  # a width of zero
        raise CheckpointError(f"{where}: its sizes make no model ({error}).") from error
    targets = {tensor.path: tensor.value for tensor in tree_paths.flatten(model)}
    head_dim = model.config.head_dim
    q, kv = model.config.num_heads * head_dim, model.config.num_kv_heads * head_dim
    tied = config.tie_word_embeddings and names.head in directory.tensors
    left_out = _left_out(directory, family)
    also_used = (*optional, *((names.head,) if tied else ()), *left_out)
    ahead = hf_config.get("num_nextn_predict_layers", hf_config.get("num_mtp_layers"))
    layers = config.num_layers
    sources = tensor_names.sources(
        directory,
        names.rules,
        targets,
        qkv_widths=(q, kv, kv),
        also_used=also_used,
        extra_layers=(layers, layers + ahead if isinstance(ahead, int) else layers),
    )
    if tied:
        tensor_names.check_tied_head(directory, names.head, names.embedding)
    return model, sources


def _left_out(directory: tensor_names.Tensors, family: models.Family) -> list[str]:
    """Names of what a model has beside its decoder; says what they are of."""
    found: dict[str, list[str]] = {}
    for pattern in family.left_out:
        names = [name for name in directory.tensors if fnmatch.fnmatchcase(name, pattern)]
        if names:
            found[pattern] = names
    if found:
        _LOGGER.warning(
            "%s: a %s model is read as one of text; left out: %s.",
            directory.path,
            family.name,
            ", ".join(f"{pattern} ({len(names)} tensors)" for pattern, names in found.items()),
        )
    return [name for names in found.values() for name in names]


def _refuse_quantized(directory: SourceDirectory) -> None:
    release = QuantizedRelease.of(directory.path, directory.config)
    if release is not None:
        raise CheckpointError(
            f"{release.where} ({release.method}): the weights are quantized already: {release}. "
            f"{release.advice()}"
        )
