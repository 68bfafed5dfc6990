"""A tree of somebody's arrays, seen below a prefix, as a model of a config, or as a template."""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import models
from fdq_checkpoints import tree_paths
from fdq_checkpoints.errors import CheckpointError, nearest
from fdq_checkpoints.readers import strict_json
from fdq_checkpoints.readers.source_directory import COMPANION_FILES, MAX_CONFIG_BYTES
from fdq_checkpoints.tree_paths import Path, dotted


def below(paths: Iterable[Path], subtree: str | None, where: pathlib.Path) -> dict[Path, Path]:
    """The paths below a dotted one, by what is left of each; all where that is None."""
    if subtree is not None and not isinstance(subtree, str):
        raise TypeError(f"subtree: expected a dotted path such as 'params', found {subtree!r}.")
    prefix, every = tuple(subtree.split(".")) if subtree else (), list(paths)
    size = len(prefix)
    found = {p[size:]: p for p in every if p[:size] == prefix and len(p) > size}
    if prefix in every or () in every:
        name = dotted(prefix) if prefix else "all of it"
        raise CheckpointError(
            f"{where}: {name} is one array, expected a tree of arrays. Give the part of the tree "
            "that holds it, or quantize the array: fdq.quantize(array, 'W4A16')."
        )
    if not found:
        tops = ", ".join(sorted({path[0] for path in every})) or "nothing"
        close = nearest(dotted(prefix), {dotted(path[:size]) for path in every})
        raise CheckpointError(
            f"{where}: nothing below {dotted(prefix)!r}; the tree has {tops}.{close}"
        )
    return found


def as_model(
    found: Mapping[Path, jax.ShapeDtypeStruct],
    config: models.DecoderConfig,
    dtype: Any,
    where: pathlib.Path,
) -> models.Decoder:
    """The abstract model of a config; CheckpointError unless its tensors are those found."""
    model = models.abstract(config, dtype)
    expected = {tensor.path: tensor.value.shape for tensor in tree_paths.flatten(model)}
    tree_paths.check_same_paths(expected=expected, found=found, what=str(where))
    for path, shape in expected.items():
        if tuple(found[path].shape) != shape:
            raise CheckpointError(
                f"{where}: {dotted(path)} has shape {tuple(found[path].shape)}, expected {shape} "
                "from the config."
            )
        if not jnp.issubdtype(found[path].dtype, jnp.floating):
            raise CheckpointError(
                f"{where}: {dotted(path)} is {found[path].dtype}, expected floats."
            )
    return model


def as_template(tree: Any, template: Any, where: pathlib.Path) -> Any:
    """The template, made abstract; CheckpointError unless its tensors are those of the tree."""
    if isinstance(template, nnx.Module):
        template = nnx.eval_shape(lambda: nnx.clone(template))
    found = {tensor.path: tensor.value for tensor in tree_paths.flatten(tree)}
    expected = {tensor.path: tensor.value for tensor in tree_paths.flatten(template)}
    tree_paths.check_same_paths(expected=expected, found=found, what=str(where))
    for path, value in expected.items():
        stored = found[path]
        problem = None
        if isinstance(value, tree_paths.QUANTIZED):
            problem = f"stored as {stored.dtype}, the template has {value.spec}"
        elif tuple(stored.shape) != tuple(value.shape):
            problem = f"stored shape {tuple(stored.shape)}, the template has {tuple(value.shape)}"
        elif stored.dtype != value.dtype:
            problem = f"stored dtype {stored.dtype}, the template has {value.dtype}"
        if problem is not None:
            raise CheckpointError(f"{where}: {dotted(path)}: {problem}.")
    return template if isinstance(template, nnx.Module) else tree_paths.fill(template, found)


def read_config(config: Any) -> tuple[models.DecoderConfig, list[pathlib.Path]]:
    """A model's config in any form that `fdq.convert` takes, and the files to copy with it.

    A DecoderConfig, the content of a Hugging Face config.json, or the path of one or of its
    directory (then with the tokenizer's files that are there).
    """
    if isinstance(config, models.DecoderConfig):
        return config, []
    files: list[pathlib.Path] = []
    where = "config"
    if not isinstance(config, Mapping):
        if not isinstance(config, str | os.PathLike):
            raise TypeError(
                "config: expected a fdq.models.DecoderConfig, the content of a config.json or its "
                f"path, got {type(config).__name__}."
            )
        path = pathlib.Path(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"config: {path}: no such file. Give a model's config.json.")
        files = [path.parent / x for x in COMPANION_FILES if (path.parent / x).is_file()]
        where, config = str(path), strict_json.read_object(path, max_bytes=MAX_CONFIG_BYTES)
    try:
        return models.from_huggingface(config), files
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
