"""`fdq.quantize_in_order`: one layer after the other, each calibrated on what it will be fed.

Statistics of one pass over the original say what a layer is fed by layers that are not quantized.
Here the sample goes through the layers that are quantized already, so that quantizers that make up
for errors (GPTQ) also make up for those of the layers before. Beside the model there are in memory
the sample's hidden states and the statistics of one layer.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import nn
from fdq.calibration.observation import calibrate
from fdq.calibration.statistics import Calibration, KeyValueRange
from fdq.models.decoder import Decoder
from fdq.nn.embedding import check_vocabulary
from fdq.nn.parameters import Template, bind, split
from fdq.quantizers.assigned import parse
from fdq.quantizers.layer_inputs import moments_for
from fdq.quantizers.quantization import match_table, quantize
from fdq.schemes.assignment import Row
from fdq.schemes.recipe import Recipe

LEAST_TOKENS = 64
"""Of fewer tokens statistics say nothing."""

_HEAD = "lm_head.kernel"


def quantize_in_order(
    model: Decoder,
    scheme: Any,
    tokens: Any,
    *,
    method: str | None = None,
    compat: str | None = None,
    rules: Any = None,
    calibration: Calibration | None = None,
    batch_size: int = 8,
    donate: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Decoder:
    """Quantizes a decoder layer by layer, each by statistics of the quantized layers before it.

    Experts that few tokens picked borrow from their layer's mean, by how few; a warning names them.

    Args:
      model: a float model of `fdq.models`; it is not changed.
      scheme: as in `fdq.quantize`.
      tokens: `[N, L]` rows of sample text.
      method: as in `fdq.quantize`.
      compat: as in `fdq.quantize`.
      rules: as in `fdq.quantize`.
      calibration: what `fdq.calibrate(model, tokens, output_moments=True)` returned, for methods
        that use moments of outputs (`gptq2`, `ldlq2`): those come from layers that follow.
      batch_size: rows that run at a time.
      donate: frees the original's arrays layer by layer; it can no longer be used.
      progress: called with (layers done, layers, "").

    Returns:
      A new model, as of `fdq.quantize`.

    Raises:
      TypeError: no `fdq.models.Decoder`.
      ValueError: what `fdq.quantize` and `fdq.calibrate` refuse; too few tokens; a method that
        needs moments of outputs without `calibration`; a model on a mesh.

    Examples:
      >>> q = fdq.quantize_in_order(model, "W4A16", tokens, method="gptq")  # doctest: +SKIP
    """
    if not isinstance(model, Decoder):
        found = type(model).__name__
        raise TypeError(f"quantize_in_order: expected a model of fdq.models, found a {found}.")
    if model.placement is not None:
        raise ValueError("quantize_in_order: the model is on a mesh; fdq.unshard it first.")
    rows = _checked(tokens, model)
    has_experts = model.config.moe is not None
    recipe = parse(scheme, rules, compat, has_experts=has_experts)
    table = match_table(model, scheme, compat=compat, rules=rules)
    needs = moments_for(recipe, method)
    known = {} if calibration is None else dict(calibration.output_moment)
    if needs["output_moments"] and not known:
        raise ValueError(
            "quantize_in_order: this method uses moments of outputs, which come from the layers "
            "that follow. Pass calibration=fdq.calibrate(model, tokens, output_moments=True), or "
            "use 'gptq' or 'ldlq'."
        )
    result = nnx.clone(model)
    starts = range(0, len(rows), batch_size)
    states = [np.asarray(_embedded(model, jnp.asarray(rows[s : s + batch_size]))) for s in starts]
    ranges: list[KeyValueRange] = []
    settings: dict[str, Any] = {"method": method, "compat": compat}
    for index in range(len(result.layers)):
        layer, prefix = result.layers[index], f"layers.{index}."
        # By what it depends on, not by number: layers that are alike share a program.
        rotary, head_dim = model.config.rotary_of(index), model.config.head_dim
        run = functools.partial(_run, rotary=rotary, head_dim=head_dim)
        own = [row for row in table.quantized if row.path.startswith(prefix)]
        seen = calibrate(layer, states, forward=run, moments=needs["moments"])
        _tell_of_experts(prefix, seen)
        ranges += seen.cache
        if own:
            outputs = {path.removeprefix(prefix): m for path, m in known.items()}
            outputs = {path: m for path, m in outputs.items() if path in seen.absmax}
            seen = dataclasses.replace(seen, output_moment=outputs)
            made = quantize(layer, _rules(own, prefix), calibration=seen, **settings)
            if donate:
                _free(layer, made)
            result.layers[index] = layer = made
        template, params = split(layer)
        states = [np.asarray(_step(template, params, x, rotary, head_dim)) for x in states]
        if progress is not None:
            progress(index + 1, len(result.layers), "")
    rest = [row for row in table.quantized if not row.path.startswith("layers.")]
    if rest:
        seen = None
        if any(row.path == _HEAD for row in rest):
            normed = [np.asarray(result.norm(jnp.asarray(x))) for x in states]
            seen = _of_head(result, normed, needs["moments"])
        result = quantize(result, _rules(rest, ""), calibration=seen, **settings)
    result.scheme, result.recipe_record = str(recipe), recipe.to_json()
    if recipe.cache is not None and recipe.cache.calibrated:
        whole = Calibration(absmax={}, mean_square={}, cache=tuple(ranges), tokens=rows.size)
        result.set_cache_scales(whole.cache_scales(recipe.cache))
    return result


def _checked(tokens: Any, model: Decoder) -> np.ndarray:
    rows = np.asarray(tokens)
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            "quantize_in_order: expected tokens [N, L] of integers, found "
            f"{rows.dtype} {list(rows.shape)}."
        )
    if rows.size < LEAST_TOKENS:
        raise ValueError(
            f"quantize_in_order: {rows.size} tokens are too few for statistics; give at least "
            f"{LEAST_TOKENS}, better 30,000."
        )
    check_vocabulary("quantize_in_order: tokens", rows, model.config.vocab_size)
    return rows.astype(np.int32)


def _rules(rows: Sequence[Row], prefix: str) -> Recipe:
    """What the whole recipe says of some tensors, each by a rule of its own."""
    return Recipe(
        [(row.path.removeprefix(prefix), row.scheme, {"quantizer": row.quantizer}) for row in rows]
    )


@jax.jit
def _embedded(model: Decoder, tokens: jax.Array) -> jax.Array:
    """What the first layer reads; the layers, which nobody asks, do not run."""
    return model(tokens, return_hidden_states=True)[1]["embed_tokens"]


def _run(layer: Any, x: jax.Array, *, rotary: Any, head_dim: int) -> jax.Array:
    """One layer over whole rows, without a cache."""
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(positions, x.shape[:2])
    angles = nn.rotary_angles(positions, rotary, head_dim)
    return layer(x, angles)[0]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _step(template: Template, params: Any, x: Any, rotary: Any, head_dim: int) -> jax.Array:
    return _run(bind(template, params), jnp.asarray(x), rotary=rotary, head_dim=head_dim)


def _of_head(model: Decoder, normed: Sequence[np.ndarray], moments: bool) -> Calibration:
    """Statistics of what the head reads."""
    alone = nnx.List([model.lm_head])
    seen = calibrate(alone, normed, forward=lambda held, x: held[0](x), moments=moments)
    names = ("absmax", "mean_square", "counts", *(["input_moment"] if moments else []))
    # One layer, or none where it is no linear one.
    renamed = {n: dict(zip([_HEAD], getattr(seen, n).values(), strict=False)) for n in names}
    return dataclasses.replace(seen, **renamed)


def _tell_of_experts(prefix: str, seen: Calibration) -> None:
    """Warns of experts whose statistics are mostly those of the others."""
    for path, few in seen.rarely_picked.items():
        named = ", ".join(f"{expert} ({count})" for expert, count in few.items())
        warnings.warn(
            f"{prefix}{path}: few tokens picked experts {named}; they borrow from their layer.",
            stacklevel=3,
        )


def _free(layer: Any, made: Any) -> None:
    kept = {id(leaf) for leaf in jax.tree.leaves(nnx.state(made))}
    for leaf in jax.tree.leaves(nnx.state(layer)):
        if id(leaf) not in kept and isinstance(leaf, jax.Array):
            leaf.delete()
