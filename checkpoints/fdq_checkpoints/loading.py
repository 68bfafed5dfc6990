"""`load`: a Hugging Face or Paddle directory, or an fdq checkpoint, as a model or a pytree."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import models
from fdq.cache.kv_cache import abstract_scales
from fdq.calibration.observation import calibrate
from fdq.formats.qtensor import QTensor
from fdq.quantizers.quantization import quantize
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import Scheme
from fdq_checkpoints import stream, tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.sources import open_source
from fdq_checkpoints.store import manifest as manifests
from fdq_checkpoints.store import orbax_store
from fdq_checkpoints.store.manifest import Manifest, TensorEntry
from fdq_checkpoints.store.restore import (
    Shardings,
    StoredTensors,
    check_shardings,
    put,
    sharding_of,
)
from fdq_checkpoints.tree_paths import Path, array_path, dotted


def load(
    path: str | os.PathLike[str],
    scheme: Any = None,
    *,
    dtype: Any = None,
    sharding: Shardings = None,
    template: Any = None,
    calibration: Any = None,
    method: str | None = None,
    compat: str | None = None,
    verify: bool = True,
    verbose: bool = False,
    progress: stream.Progress | None = None,
) -> Any:
    """Load a checkpoint, quantizing it on the way if a scheme is given.

    Args:
      path: a directory: a float model as Hugging Face or Paddle publish it, or an fdq checkpoint.
      scheme: anything that `fdq.quantize` takes. From a float directory, each tensor is
        quantized as it is read, so that the float model is never in memory as a whole.
      dtype: `"float32"`, `"bfloat16"` or `"float16"` of a model's activations and of its
        parameters that are not quantized; by default the checkpoint's.
      sharding: where arrays go: one `jax.sharding.Sharding`, a mapping from dotted array paths
        (`layers.0.mlp.down_proj.kernel.codes`), or a function of that path and a
        `jax.ShapeDtypeStruct`. By default the default device.
      template: for checkpoints of your own modules and pytrees, an object of the same structure
        (abstract or not, quantized or not). Without one these come back as nested dicts.
      calibration: statistics for quantizers that use them and for static scales: what
        `fdq.calibrate` returned, or sample tokens `[batch, length]`; with tokens the float
        model is in memory as a whole while it runs over them.
      method: what chooses the codes, as in `fdq.quantize`.
      compat: as in `fdq.quantize`.
      verify: compare checksums of fdq checkpoints.
      verbose: prints what was quantized, and what was left and why.
      progress: called after each tensor with (bytes done, bytes in all, path).

    Returns:
      An `fdq.models.Decoder`; or for an fdq checkpoint of something else, the template filled,
      or nested dicts of arrays and QTensors.

    Raises:
      FileNotFoundError: `path` does not exist.
      CheckpointError: the checkpoint is refused; the message says what is wrong and where.
      ValueError: a dtype that models do not compute in.
    """
    stream.check_dtype(dtype)
    folder = pathlib.Path(path)
    options: dict[str, Any] = {"method": method, "compat": compat, "calibration": calibration}
    if os.path.lexists(folder / manifests.FILE_NAME):
        stored = StoredTensors(folder)
        obj = _load_stored(stored, sharding, template, dtype, verify)
        if scheme is None:
            return obj
        if any(entry.spec is not None for entry in stored.manifest.tensors):
            raise CheckpointError(
                f"{folder}: quantized already ({stored.manifest.scheme}). Load it without a "
                "scheme, or convert the original again."
            )
        if calibration is not None and not stream.is_statistics(calibration):
            options["calibration"] = calibrate(obj, calibration)
        return quantize(obj, scheme, verbose=verbose, **options)
    if template is not None:
        raise CheckpointError(f"{folder}: a template is for fdq checkpoints; there is no fdq.json.")
    if folder.name.endswith(".fdq-tmp"):
        raise CheckpointError(f"{folder}: unfinished; convert or save again.")
    if orbax_store.is_orbax(folder):
        raise CheckpointError(
            f"{folder}: an Orbax checkpoint without fdq.json. Restore it with Orbax, or make an "
            "fdq checkpoint of it with `fdq convert`."
        )

    def place(tensor: tree_paths.Tensor) -> Any:
        return tree_paths.map_arrays(
            lambda path, array: put(array, sharding_of(sharding, path, array)), tensor
        )

    with open_source(folder, dtype=dtype) as source:
        job = stream.Job.of(source, scheme, progress=progress, place=place, **options)
        if verbose and job.assigned is not None:
            print(job.assigned.table.summary())
        tensors = tree_paths.flatten(job.tree)
        check_shardings(sharding, _array_paths(tensors))
        values = {tensor.path: place(tensor) for tensor in job.tensors(progress=progress)}
        model = tree_paths.fill(job.tree, values)
    if isinstance(model, models.Decoder):
        _set_tokenizer(model, folder)
    return model


def _load_stored(
    stored: StoredTensors, sharding: Shardings, template: Any, dtype: Any, verify: bool
) -> Any:
    manifest = stored.manifest
    check_shardings(
        sharding,
        [array_path(entry.path, name) for entry in manifest.tensors for name in entry.arrays],
    )
    if template is not None:
        target = _like_stored(template, manifest, stored.folder)
        values = stored.restore(sharding or _template_shardings(target), verify=verify)
        return tree_paths.fill(target, values)
    if manifest.kind == "params":
        if dtype is not None:
            raise CheckpointError(f"{stored.folder}: dtype= is for models, this is a pytree.")
        return tree_paths.nested(stored.restore(sharding, verify=verify))
    config = stored.config()
    try:
        template = models.abstract(config, dtype)
        recipe = manifest.provenance.get("recipe")
        cache = Recipe.from_json(recipe).cache if recipe else None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{stored.folder}: config or recipe in fdq.json: {error}") from error
    if any(str(entry.path[-1]).endswith("_cache_scale") for entry in manifest.tensors) and cache:
        template.set_cache_scales(abstract_scales(template.config, cache))
    target = _like_stored(template, manifest, stored.folder, cast=True)
    values = stored.restore(sharding, verify=verify)
    for tensor in tree_paths.flatten(target):
        if not isinstance(tensor.value, QTensor) and dtype is not None:
            values[tensor.path] = values[tensor.path].astype(tensor.value.dtype)
    model = tree_paths.fill(target, values)
    model.scheme = manifest.scheme
    model.recipe_record = manifest.provenance.get("recipe")
    _set_tokenizer(model, stored.folder)
    return model


def _like_stored(
    template: Any, manifest: Manifest, folder: pathlib.Path, *, cast: bool = False
) -> Any:
    """The template, quantized as the stored tensors are, and compared with them.

    Raises:
      CheckpointError: paths, shapes, dtypes or specs differ.
    """
    entries = {entry.path: entry for entry in manifest.tensors}
    is_quantized = {
        tensor.path: isinstance(tensor.value, QTensor) for tensor in tree_paths.flatten(template)
    }
    to_quantize = [
        entry
        for entry in manifest.tensors
        if entry.spec is not None and is_quantized.get(entry.path) is False
    ]
    if isinstance(template, nnx.Module) and to_quantize:
        recipe = _exact_recipe(to_quantize)
        template = quantize(_abstract(template), recipe)
    tensors = tree_paths.flatten(template)
    tree_paths.check_same_paths(
        expected=[tensor.path for tensor in tensors], found=entries, what=str(folder)
    )
    for tensor in tensors:
        entry = entries[tensor.path]
        problem = _difference(tensor.value, entry, cast)
        if problem is None and tensor.activation != entry.activation and _is_module(template):
            problem = f"activation {entry.activation}, the template has {tensor.activation}"
        if problem is not None:
            raise CheckpointError(f"{folder}: {dotted(tensor.path)}: {problem}.")
    return template


def _exact_recipe(entries: list[TensorEntry]) -> Recipe:
    """A recipe that stores each of these tensors by its spec, and leaves all others."""
    return Recipe(
        [
            (
                "".join(f"[{char}]" if char in "*?[{" else char for char in dotted(entry.path)),
                Scheme(weight=entry.spec, activation=entry.activation),
            )
            for entry in entries
        ]
    )


def _is_module(tree: Any) -> bool:
    """Whether activations are recorded in the tree itself."""
    return isinstance(tree, nnx.Module)


def _difference(value: Any, entry: TensorEntry, cast: bool) -> str | None:
    if tuple(value.shape) != entry.shape:
        return f"stored shape {entry.shape}, the template has {tuple(value.shape)}"
    if isinstance(value, QTensor):
        if value.spec != entry.spec:
            return f"stored as {entry.spec}, the template has {value.spec}"
        return None
    if entry.spec is not None or entry.prng is not None or cast:
        return None
    dtype = entry.arrays["value"].dtype
    if jnp.dtype(value.dtype) != jnp.dtype(dtype):
        return f"stored dtype {dtype}, the template has {value.dtype}"
    return None


def _abstract(module: nnx.Module) -> nnx.Module:
    return nnx.eval_shape(lambda: nnx.clone(module))


def _template_shardings(template: Any) -> Callable[[str, jax.ShapeDtypeStruct], Any]:
    """The shardings that the template's own leaves carry."""
    found = {}
    for tensor in tree_paths.flatten(template):
        for name, array in tree_paths.arrays_of(tensor.value).items():
            sharding = getattr(array, "sharding", None)
            if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(
                sharding.mesh, jax.sharding.Mesh
            ):
                found[dotted(array_path(tensor.path, name))] = sharding
    return lambda path, _: found.get(path)


def _array_paths(tensors: list[tree_paths.Tensor]) -> list[Path]:
    return [
        array_path(tensor.path, name)
        for tensor in tensors
        for name in tree_paths.arrays_of(tensor.value)
    ]


def _set_tokenizer(model: models.Decoder, folder: pathlib.Path) -> None:
    path = folder / "tokenizer.json"
    if path.is_file():
        model.tokenizer_path = str(path.absolute())
