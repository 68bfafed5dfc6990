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
from fdq.decoding import special_tokens
from fdq.formats.qtensor import QTensor
from fdq.quantizers.quantization import quantize
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import Scheme
from fdq_checkpoints import stream, tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.sources import open_source
from fdq_checkpoints.store import manifest as manifests
from fdq_checkpoints.store import orbax_store, restore
from fdq_checkpoints.store.manifest import Manifest, TensorEntry
from fdq_checkpoints.store.restore import Shardings, StoredTensors
from fdq_checkpoints.tree_paths import array_path, dotted


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
    """What `fdq.load` does and says, but for its `prepare`."""
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
        def put(path: tree_paths.Path, array: Any) -> Any:
            return restore.put(array, restore.sharding_of(sharding, path, array))

        return tree_paths.map_arrays(put, tensor)

    with open_source(folder, dtype=dtype) as source:
        stops = _stop_tokens(folder)
        job = stream.Job.of(source, scheme, progress=progress, place=place, **options)
        if verbose and job.assigned is not None:
            print(job.assigned.table.summary())
        tensors = tree_paths.flatten(job.tree)
        restore.check_shardings(
            sharding, ((t.path, tree_paths.arrays_of(t.value)) for t in tensors)
        )
        values = {tensor.path: place(tensor) for tensor in job.tensors(progress=progress)}
        model = tree_paths.fill(job.tree, values)
    if isinstance(model, models.Decoder):
        _set_text(model, folder, stops)
    return model


def _load_stored(
    stored: StoredTensors, sharding: Shardings, template: Any, dtype: Any, verify: bool
) -> Any:
    manifest = stored.manifest
    restore.check_shardings(sharding, ((entry.path, entry.arrays) for entry in manifest.tensors))
    if template is not None:
        target = _like_stored(template, manifest, stored.folder)
        values = stored.restore(sharding or _template_shardings(target), verify=verify)
        return tree_paths.fill(target, values)
    if manifest.kind == "params":
        if dtype is not None:
            raise CheckpointError(f"{stored.folder}: dtype= is for models, this is a pytree.")
        return tree_paths.nested(stored.restore(sharding, verify=verify))
    config = stored.config()
    stops = _stop_tokens(stored.folder)
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
    _set_text(model, stored.folder, stops)
    return model


def _like_stored(
    template: Any, manifest: Manifest, folder: pathlib.Path, *, cast: bool = False
) -> Any:
    """The template, quantized as the stored tensors are; CheckpointError where it is another."""
    entries = {entry.path: entry for entry in manifest.tensors}
    is_module = isinstance(template, nnx.Module)
    if is_module:
        plain = [t.path for t in tree_paths.flatten(template) if not isinstance(t.value, QTensor)]
        found = [entries[path] for path in plain if path in entries]
        if to_quantize := [entry for entry in found if entry.spec is not None]:
            abstract = nnx.eval_shape(lambda: nnx.clone(template))
            template = quantize(abstract, _exact_recipe(to_quantize))
    tensors = tree_paths.flatten(template)
    tree_paths.check_same_paths(
        expected=[tensor.path for tensor in tensors], found=entries, what=str(folder)
    )
    for tensor in tensors:
        entry = entries[tensor.path]
        problem = _difference(tensor.value, entry, cast)
        if problem is None and is_module and tensor.activation != entry.activation:
            problem = f"activation {entry.activation}, the template has {tensor.activation}"
        if problem is not None:
            raise CheckpointError(f"{folder}: {dotted(tensor.path)}: {problem}.")
    return template


def _exact_recipe(entries: list[TensorEntry]) -> Recipe:
    """A recipe that stores each of these tensors by its spec, and leaves all others."""
    rules = []
    for entry in entries:
        pattern = "".join(f"[{char}]" if char in "*?[{" else char for char in dotted(entry.path))
        rules.append((pattern, Scheme(weight=entry.spec, activation=entry.activation)))
    return Recipe(rules)


def _difference(value: Any, entry: TensorEntry, cast: bool) -> str | None:
    if tuple(value.shape) != entry.shape:
        return f"stored shape {entry.shape}, the template has {tuple(value.shape)}"
    if isinstance(value, QTensor):
        same = value.spec == entry.spec
        return None if same else f"stored as {entry.spec}, the template has {value.spec}"
    if entry.spec is not None or entry.prng is not None or cast:
        return None
    dtype = entry.arrays["value"].dtype
    if jnp.dtype(value.dtype) != jnp.dtype(dtype):
        return f"stored dtype {dtype}, the template has {value.dtype}"
    return None


def _template_shardings(template: Any) -> Callable[[str, jax.ShapeDtypeStruct], Any]:
    """The shardings that the template's own leaves carry."""
    found = {}
    for tensor in tree_paths.flatten(template):
        for name, array in tree_paths.arrays_of(tensor.value).items():
            sharding = getattr(array, "sharding", None)
            mesh = getattr(sharding, "mesh", None)
            if isinstance(mesh, jax.sharding.Mesh):
                found[dotted(array_path(tensor.path, name))] = sharding
    return lambda path, _: found.get(path)


def _stop_tokens(folder: pathlib.Path) -> tuple[int, ...]:
    """What the files beside the weights say about where a text ends; read before the weights."""
    try:
        return special_tokens.stop_token_ids(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _set_text(model: models.Decoder, folder: pathlib.Path, stops: tuple[int, ...]) -> None:
    path = folder / "tokenizer.json"
    if path.is_file():
        model.tokenizer_path = str(path.absolute())
    stops = special_tokens.union(model.config.eos_token_ids, stops)
    model.config = model.config.replace(eos_token_ids=stops)
