"""`load`: a Hugging Face or Paddle directory, or an fdq checkpoint, as a model or a pytree."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import models
from fdq.calibration.observation import calibrate
from fdq.decoding import special_tokens
from fdq.ops.preparation import unprepare
from fdq.ops.prepared_weight import PreparedWeight
from fdq.quantizers.layer_inputs import moments_for
from fdq.quantizers.quantization import quantize
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import Scheme
from fdq.sharding import distribution
from fdq_checkpoints import stream, tree_paths
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.readers.file_names import text_folder
from fdq_checkpoints.readers.local_directory import (
    sentencepiece,
    tell_of_sentencepiece,
)
from fdq_checkpoints.sources import open_source, tree_view
from fdq_checkpoints.sources.runs import checkpoint_directory
from fdq_checkpoints.sources.stored_tree import StoredTree
from fdq_checkpoints.store import adapters, restore
from fdq_checkpoints.store import manifest as manifests
from fdq_checkpoints.store.commit import unreplaced
from fdq_checkpoints.store.manifest import TensorEntry
from fdq_checkpoints.store.restore import Shardings, StoredTensors
from fdq_checkpoints.store.stored_model import abstract_model, prepared_of
from fdq_checkpoints.tree_paths import array_path, dotted


def load(path: str | os.PathLike[str], scheme: Any = None, **options: Any) -> Any:
    """What `fdq.load` does and says, but for its `prepare`; keywords as of `_load`."""
    return unreplaced(path, lambda: _load(path, scheme, **options))


def _load(
    path: str | os.PathLike[str],
    scheme: Any = None,
    *,
    dtype: Any = None,
    sharding: Shardings = None,
    mesh: Any = None,
    mesh_rules: Any = None,
    template: Any = None,
    calibration: Any = None,
    method: str | None = None,
    compat: str | None = None,
    config: Any = None,
    subtree: str | None = None,
    verify: bool = True,
    verbose: bool = False,
    progress: stream.Progress | None = None,
) -> Any:
    stream.check_dtype(dtype)
    if mesh is not None and (sharding is not None or template is not None):
        raise ValueError(
            "load: mesh= puts a model of fdq on devices; leave out sharding, template."
        )
    if mesh is None and mesh_rules is not None:
        raise ValueError("load: mesh_rules= say what a mesh cuts; give the mesh= too.")
    folder = checkpoint_directory(path)
    options: dict[str, Any] = {"method": method, "compat": compat, "calibration": calibration}
    is_stored = os.path.lexists(folder / manifests.FILE_NAME)
    if is_stored and config is None and subtree is None:
        sharded = template is not None and _template_shardings(template) is not None
        may_have_adapters = isinstance(template, models.Decoder)
        if scheme is None:
            stored = StoredTensors(folder)
            return _load_stored(stored, sharding, template, dtype, verify, mesh, mesh_rules)
        if may_have_adapters or (sharded and sharding is None):
            # Not tensor by tensor: shards are quantized where they are, adapters are not at all.
            stored = StoredTree(folder, verify=verify)  # refuses what is quantized
            loaded = _load_stored(stored.tensors, sharding, template, dtype, verify)
            if calibration is not None and not stream.is_statistics(calibration):
                recipe = Recipe.parse(scheme, compat=compat)
                wanted = moments_for(recipe, method)
                options["calibration"] = calibrate(loaded, calibration, **wanted)
            return quantize(loaded, scheme, verbose=verbose, donate=True, **options)
    if folder.name.endswith(".fdq-tmp"):
        raise CheckpointError(f"{folder}: unfinished; convert or save again.")

    placement: Any = None

    def place(tensor: tree_paths.Tensor) -> Any:
        if placement is not None:
            return distribution.put(placement, dotted(tensor.path), tensor.value)

        def put(path: tree_paths.Path, array: Any) -> Any:
            return restore.put(array, restore.sharding_of(sharding, path, array))

        return tree_paths.map_arrays(put, tensor)

    with open_source(folder, dtype=dtype, config=config, subtree=subtree) as source:
        beside = text_folder(source.companions(), folder)
        stops = _stop_tokens(beside)
        if isinstance(source, StoredTree):
            source.verify = verify
        if template is not None:
            source.tree = tree_view.as_template(source.tree, template, folder)
        job = stream.Job.of(source, scheme, progress=progress, place=place, **options)
        if job.assigned is not None:
            job.assigned.table.report(verbose=verbose)
        tensors = tree_paths.flatten(job.tree)
        restore.check_shardings(
            sharding, ((t.path, tree_paths.arrays_of(t.value)) for t in tensors)
        )
        placement = _placement(job.tree, folder, mesh, mesh_rules)
        values = {tensor.path: place(tensor) for tensor in job.tensors(progress=progress)}
        loaded = tree_paths.fill(job.tree, values)
    if placement is not None:
        distribution.settle(loaded, placement)
    if isinstance(loaded, models.Decoder):
        _set_text(loaded, beside, stops)
        adapters.tell(folder)
    return loaded


def _placement(tree: Any, folder: pathlib.Path, mesh: Any, rules: Any) -> Any:
    """How a model that is to be loaded lies on a mesh; None without one."""
    if mesh is None:
        return None
    if not isinstance(tree, models.Decoder):
        raise CheckpointError(
            f"{folder}: mesh= is for models of fdq, and this is a tree. Give a sharding= of arrays."
        )
    distribution.check_devices(mesh)
    return distribution.plan(tree, mesh, rules)


def _load_stored(
    stored: StoredTensors,
    sharding: Shardings,
    template: Any,
    dtype: Any,
    verify: bool,
    mesh: Any = None,
    mesh_rules: Any = None,
) -> Any:
    manifest = stored.manifest
    restore.check_shardings(sharding, ((entry.path, entry.arrays) for entry in manifest.tensors))
    if template is not None:
        return _fill_template(stored, sharding, template, verify)
    if manifest.kind == "params":
        _placement(None, stored.folder, mesh, mesh_rules)
        if dtype is not None:
            raise CheckpointError(f"{stored.folder}: dtype= is for models, this is a pytree.")
        return tree_paths.nested(stored.restore(sharding, verify=verify))
    stops = _stop_tokens(stored.folder)
    template = abstract_model(stored, dtype)
    entries = {entry.path: entry for entry in manifest.tensors}
    target = _like_stored(template, entries, stored.folder, cast=True)
    placement = _placement(target, stored.folder, mesh, mesh_rules)
    place = None
    if placement is not None:
        place = functools.partial(distribution.put, placement)
    by_parts = jax.process_count() > 1 and (stored.has_file_checksums or not verify)
    if placement is not None and place is not None and by_parts:
        parts = functools.partial(distribution.parts, placement)
        values = stored.restore_parts(place, parts, verify=verify)
    else:
        values = stored.restore(sharding, verify=verify, place=place)
    for tensor in tree_paths.flatten(target):
        if not isinstance(tensor.value, tree_paths.QUANTIZED) and dtype is not None:
            values[tensor.path] = values[tensor.path].astype(tensor.value.dtype)
    model = tree_paths.fill(target, values)
    if placement is not None:
        distribution.settle(model, placement)
    model.scheme = manifest.scheme
    model.recipe_record = manifest.provenance.get("recipe")
    model.prepared = prepared_of(stored)
    _set_text(model, stored.folder, stops)
    adapters.tell(stored.folder)
    return model


def _fill_template(stored: StoredTensors, sharding: Shardings, template: Any, verify: bool) -> Any:
    """The template with all stored tensors; of a model those of its adapters too."""
    sources = [(stored, {entry.path: entry.path for entry in stored.manifest.tensors})]
    if isinstance(template, models.Decoder) and stored.manifest.kind == "model":
        template = _in_layout_of_checkpoints(template)
        parts = adapters.Parts.of(template)
        places = {place: tensor.path for place, tensor in parts.base.items()}
        sources = [(stored, {path: places.get(path, path) for path in sources[0][1]})]
        beside = adapters.of_checkpoint(stored.folder)
        if parts.adapters and beside is not None:
            more = StoredTensors(beside)
            sources.append((more, {entry.path: entry.path for entry in more.manifest.tensors}))
    entries = {
        paths[entry.path]: dataclasses.replace(entry, path=paths[entry.path])
        for one, paths in sources
        for entry in one.manifest.tensors
    }
    target = _like_stored(template, entries, stored.folder)
    shardings = sharding or _template_shardings(target)
    values = {}
    for one, paths in sources:
        restored = one.restore(shardings, verify=verify, paths=paths)
        values |= {paths[path]: value for path, value in restored.items()}
    return tree_paths.fill(target, values)


def _in_layout_of_checkpoints(model: models.Decoder) -> models.Decoder:
    """The model, or a copy of one that is laid out for its device."""
    held = (one for _, module in nnx.iter_modules(model) for one in vars(module).values())
    prepared = any(isinstance(one, PreparedWeight) for one in held)
    return unprepare(model) if prepared else model


def _like_stored(
    template: Any,
    entries: Mapping[tree_paths.Path, TensorEntry],
    folder: pathlib.Path,
    *,
    cast: bool = False,
) -> Any:
    """The template, quantized as the stored tensors are; CheckpointError where it is another."""
    is_module = isinstance(template, nnx.Module)
    if is_module:
        tensors = tree_paths.flatten(template)
        plain = [t.path for t in tensors if not isinstance(t.value, tree_paths.QUANTIZED)]
        found = [entries[path] for path in plain if path in entries]
        schemes = {
            entry.path: Scheme(weight=entry.spec, activation=entry.activation)
            for entry in found
            if entry.spec is not None
        }
        if schemes:
            abstract = nnx.eval_shape(lambda: nnx.clone(template))
            template = quantize(abstract, tree_paths.exact_recipe(schemes))
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


def _difference(value: Any, entry: TensorEntry, cast: bool) -> str | None:
    if tuple(value.shape) != entry.shape:
        return f"stored shape {entry.shape}, the template has {tuple(value.shape)}"
    if isinstance(value, tree_paths.QUANTIZED):
        if getattr(value, "fold", None) != entry.fold:
            return "stored with other contracted axes than the template has"
        same = value.spec == entry.spec
        return None if same else f"stored as {entry.spec}, the template has {value.spec}"
    if entry.spec is not None or entry.prng is not None or cast:
        return None
    dtype = entry.arrays["value"].dtype
    if jnp.dtype(value.dtype) != jnp.dtype(dtype):
        return f"stored dtype {dtype}, the template has {value.dtype}"
    return None


def _template_shardings(template: Any) -> Callable[[str, jax.ShapeDtypeStruct], Any] | None:
    """The shardings that the template's own leaves carry; None if they carry none."""
    found = {}
    for tensor in tree_paths.flatten(template):
        for name, array in tree_paths.arrays_of(tensor.value).items():
            sharding = getattr(array, "sharding", None)
            mesh = getattr(sharding, "mesh", None)
            if isinstance(mesh, jax.sharding.Mesh):
                found[dotted(array_path(tensor.path, name))] = sharding
    return (lambda path, _: found.get(path)) if found else None


def _stop_tokens(folder: pathlib.Path) -> tuple[int, ...]:
    """What the files beside the weights say about where a text ends; read before the weights."""
    try:
        return special_tokens.stop_token_ids(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _set_text(model: models.Decoder, folder: pathlib.Path, stops: tuple[int, ...]) -> None:
    path = folder / "tokenizer.json"
    # Where only a SentencePiece model is, the tokenizer explains what is missing when text comes.
    if path.is_file() or sentencepiece(folder) is not None:
        model.tokenizer_path = str(path.absolute())
    stops = special_tokens.union(model.config.eos_token_ids, stops)
    model.config = model.config.replace(eos_token_ids=stops)
    tell_of_sentencepiece(folder)
