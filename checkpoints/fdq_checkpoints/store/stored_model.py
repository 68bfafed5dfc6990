"""The abstract model that an fdq checkpoint says it holds."""

from typing import Any

from fdq import models
from fdq.cache.kv_cache import abstract_scales
from fdq.schemes.recipe import Recipe
from fdq_checkpoints.errors import CheckpointError
from fdq_checkpoints.store.restore import StoredTensors


def abstract_model(stored: StoredTensors, dtype: Any = None) -> models.Decoder:
    """The float model of the stored config, with the static scales of a cache if it has some."""
    config, manifest = stored.config(), stored.manifest
    try:
        model = models.abstract(config, dtype)
        recipe = manifest.provenance.get("recipe")
        cache = Recipe.from_json(recipe).cache if recipe else None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{stored.folder}: config or recipe in fdq.json: {error}") from error
    calibrated = ("_cache_scale", "_cache_mean")
    if any(str(entry.path[-1]).endswith(calibrated) for entry in manifest.tensors) and cache:
        model.set_cache_scales(abstract_scales(model.config, cache))
    model.prepared = prepared_of(stored)
    return model


def prepared_of(stored: StoredTensors) -> str | None:
    """What was done to the weights before they were quantized or stored; None for nothing."""
    found = stored.manifest.provenance.get("prepared")
    return str(found) if found else None
