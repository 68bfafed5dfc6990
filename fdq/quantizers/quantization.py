"""``fdq.quantize``: an array, a pytree of parameters, or anyone's NNX module."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq.cache.kv_cache import abstract_scales
from fdq.calibration.observation import Calibration
from fdq.formats.qtensor import QTensor
from fdq.models import Decoder
from fdq.quantizers import pick, quantize_array
from fdq.quantizers.modules import (
    DEFAULTS_OF_MODULES,
    Tensor,
    collect,
    describe,
    quantize_module,
)
from fdq.schemes import assignment
from fdq.schemes.assignment import Leaf, MatchTable
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import CacheSpec, Scheme


def quantize(
    target: Any,
    scheme: Any,
    *,
    method: str | None = None,
    compat: str | None = None,
    importance: Any = None,
    calibration: Any = None,
    rules: Any = None,
    donate: bool = False,
    quiet: bool = False,
) -> Any:
    """Quantizes weights; a pure function of its arguments.

    What becomes of what:

    - an array or ``jax.ShapeDtypeStruct`` ``[..., K, N]``: a ``QTensor``;
    - an NNX module: a new module in which ``fdq.nn.Linear`` and ``fdq.nn.Experts`` hold QTensors,
      and ``nnx.Linear`` (also stacked by ``nnx.scan`` or ``nnx.vmap``), ``nnx.LinearGeneral``
      without batch axes (so ``nnx.MultiHeadAttention`` as well) and ``nnx.Einsum`` that are one
      matrix product are replaced by ``fdq.nn.QuantizedLinear`` and its kin. Modules and Variables
      that were shared stay shared. The module passed in is not changed;
    - any other pytree (Linen's params, dicts, ``nnx.State``): the same tree with QTensors in
      place of the 2-D float leaves named kernel, weight or w, and of whatever a rule names.

    Which tensors: see ``fdq.Recipe``. What was left as it is, and why, is printed.

    Memory: one tensor at a time, and the temporaries of its quantizer (the scale search of 4 bits
    and fewer works on one float32 matrix of a stack). The source stays alive, as the caller holds
    it; with ``donate=True`` each source array is freed as soon as it is quantized, and the
    original can no longer be used.

    Args:
      target: what to quantize; modules and trees may hold ``jax.ShapeDtypeStruct`` s.
      scheme: whatever ``fdq.Recipe.parse`` takes, e.g. ``"W4A16C8"``. Activation formats become
        part of modules; in arrays and trees they have no place, pass ``activation=`` to
        ``fdq.matmul``. The cache format matters to ``fdq.KVCache`` only.
      method: how scales are chosen, see ``fdq.quantizers.quantize_array``.
      compat: ``"fastdeploy"`` reads names as FastDeploy does (``fdq.Recipe.parse``) and rounds its
        WINT8 and WINT4 bit for bit; ``"fastdeploy-cpu"`` as its CPU kernel.
      importance: mean square of each input channel, ``[K]``; for trees and modules what
        ``fdq.calibrate`` returns, or a mapping from paths to such arrays. Guides the scale search,
        and is not used by other methods.
      calibration: for modules only: what ``fdq.calibrate`` returns (not the sample tokens), or a
        mapping from paths to the absmax of the layer's input (a number, or by channel); needed by
        static activations (``-static``).
      rules: more rules, ahead of the recipe's own: a dict or a list of pairs.
      donate: frees source arrays on the way.
      quiet: prints nothing.

    Returns:
      Of the kind of ``target``, see above.

    Raises:
      ValueError: an unknown scheme, a rule or a path of statistics that matches nothing, a shape
        that does not fit, NaN or infinity in a weight, static activations without calibration.
        Names the path.
      TypeError: no array, tree or module; statistics that are none.

    Examples:
      >>> model = fdq.quantize(model, "W4A16C8")
      >>> params = fdq.quantize(params, {"*.attention": "W8A16", "head": None, "*": "W4A16"})
    """
    if isinstance(target, (nnx.Variable, QTensor)):
        kind = type(target).__name__
        raise TypeError(f"Cannot quantize a {kind}; pass the array, or the module that holds it.")
    is_module = isinstance(target, nnx.Pytree)
    if calibration is not None and not is_module:
        raise ValueError(
            "calibration= gives the layers of an NNX module their static scales. An array or a "
            "pytree has no layers: pass activation_scale= to fdq.matmul."
        )
    if _is_array(target):
        work = _Work(method, compat, importance, None, donate)
        recipe = _recipe(scheme, rules, compat, has_experts=False)
        if recipe.default is None or recipe.rules:
            raise ValueError(
                f"One array takes one scheme with a weight format, such as 'W4A16'; got {recipe}."
            )
        if isinstance(importance, (Mapping, Calibration)):
            raise TypeError(
                f"importance= of one array is an array [K], got {type(importance).__name__}."
            )
        q = work.quantize(target, recipe.default, ["<array>"])
        work.free(target)
        return q
    # The clone has the target's arrays in Variables of its own.
    target = nnx.clone(target) if is_module else target
    tensors = collect(target) if is_module else None
    leaves, recipe, table = _matched(target, tensors, scheme, compat, rules)
    work = _Work(
        method,
        compat,
        _by_path("importance", importance, leaves),
        _by_path("calibration", calibration, leaves),
        donate,
    )
    if tensors is None:
        result = _quantize_tree(target, table, work)
    else:
        options: Any = {"quantize": work.quantize, "activation_scale": work.activation_scale}
        result = quantize_module(target, tensors, table, donate=donate, **options)
        if hasattr(result, "recipe_record") and hasattr(result, "scheme"):
            result.scheme, result.recipe_record = str(recipe), recipe.to_json()
        _keep_cache_scales(result, recipe.cache, calibration)
    if not quiet:
        print(table.summary())
    return result


def match_table(
    target: Any, scheme: Any, *, compat: str | None = None, rules: Any = None
) -> MatchTable:
    """What ``quantize`` would do with each tensor, without doing it.

    Args:
      target: an NNX module or any pytree, concrete or abstract.
      scheme: as in ``quantize``.
      compat: as in ``quantize``.
      rules: as in ``quantize``.

    Returns:
      A ``MatchTable``: prints aligned, ``rows`` for programs.
    """
    tensors = collect(target) if isinstance(target, nnx.Pytree) else None
    return _matched(target, tensors, scheme, compat, rules)[2]


def _matched(
    target: Any, tensors: list[Tensor] | None, scheme: Any, compat: str | None, rules: Any
) -> tuple[list[Leaf], Recipe, MatchTable]:
    """The leaves of a tree, or of a module with these tensors; the recipe; what it does to each."""
    if tensors is None:
        leaves, hint = assignment.leaves_of(target), assignment.DEFAULTS_OF_TREES
    else:
        leaves, hint = [describe(tensor) for tensor in tensors], DEFAULTS_OF_MODULES
    recipe = _recipe(scheme, rules, compat, has_experts=_has_experts(leaves))
    return leaves, recipe, assignment.assign(recipe, leaves, hint=hint)


def _by_path(name: str, values: Any, leaves: list[Leaf]) -> Mapping[str, Any] | None:
    """Statistics of inputs by path, from a Calibration or a mapping whose paths must exist."""
    if values is None:
        return None
    if isinstance(values, Calibration):
        return values.importance if name == "importance" else values.absmax
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{name}= is what fdq.calibrate(model, tokens) returns, or a mapping from paths; got "
            f"{type(values).__name__}. Sample tokens go to fdq.calibrate."
        )
    paths = [path for leaf in leaves for path in (leaf.path, *leaf.aliases)]
    known = {*paths, *(path.rpartition(".")[0] for path in paths)}
    for path in values:
        if path not in known:
            near = ", ".join(assignment.nearest(path, paths)) or "(no tensors)"
            raise ValueError(f"{name}: there is no tensor {path!r}. Nearest paths: {near}.")
    return values


def _recipe(scheme: Any, rules: Any, compat: str | None, has_experts: bool) -> Recipe:
    recipe = Recipe.parse(scheme, compat=compat, has_experts=has_experts)
    if rules is None:
        return recipe
    extra = Recipe(rules.items() if isinstance(rules, Mapping) else rules)
    if extra.default is not None or extra.cache is not None:
        raise ValueError(
            "rules= go ahead of those of the scheme: they have no '*' and no cache. Put these into "
            "the scheme."
        )
    fields = {"cache": recipe.cache, "record": recipe.record}
    return Recipe((*extra.rules, *recipe.rules), recipe.default, **fields)


def _has_experts(leaves: list[Leaf]) -> bool:
    return any("experts" in leaf.path.split(".") for leaf in leaves)


def _keep_cache_scales(model: Any, cache: CacheSpec | None, calibration: Any) -> None:
    """Gives a Decoder the calibrated scales of a static KV cache; a user's own module has none.

    Without calibration a concrete model gets none: ``KVCache.init`` can be given others, and says
    so where it is not. An abstract model gets their shapes.
    """
    if cache is None or cache.dynamic or not isinstance(model, Decoder):
        return
    if isinstance(model.norm.scale.get_value(), jax.ShapeDtypeStruct):
        model.set_cache_scales(abstract_scales(model.config, cache))
    elif isinstance(calibration, Calibration):
        model.set_cache_scales(calibration.cache_scales(cache))


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


@dataclasses.dataclass(frozen=True)
class _Work:
    """The options of one call, applied to one tensor after the other."""

    method: str | None
    compat: str | None
    importance: Any
    calibration: Mapping[str, Any] | None
    donate: bool

    def quantize(self, array: Any, scheme: Scheme, paths: list[str]) -> QTensor:
        """The QTensor of a folded array; any of the paths that lead to it may have statistics."""
        spec, path = scheme.weight, paths[0]
        assert spec is not None
        compat = self.compat if self._fastdeploy_has(scheme, array.dtype) else None
        importance = self.importance
        if isinstance(importance, Mapping):
            searched = "mean_square" in pick(spec, self.method, path, array.dtype).statistics
            importance = _at(importance, paths) if searched and compat is None else None
        return quantize_array(
            array, spec, method=self.method, compat=compat, importance=importance, path=path
        )

    def _fastdeploy_has(self, scheme: Scheme, dtype: Any) -> bool:
        """Whether FastDeploy rounds this tensor in a way of its own (WINT8, WINT4, W8A8, W4A8)."""
        spec, activation = scheme.weight, scheme.activation
        return (
            spec is not None
            and spec.format in ("int8", "int4")
            and spec.zero_point == "none"
            and spec.granularity in ("channel", "group")
            and spec.scale_dtype in ("float32", str(jnp.dtype(dtype)))
            and (activation is None or activation.format == "int8")
        )

    def activation_scale(
        self, scheme: Scheme, paths: list[str], shape: tuple[int, ...], abstract: bool
    ) -> Any:
        """float32 scale of a static activation, one for each leading axis; None if dynamic."""
        spec, path, lead = scheme.activation, paths[0], shape[:-2]
        if spec is None or spec.dynamic:
            return None
        if abstract:
            return jax.ShapeDtypeStruct(lead, jnp.float32)
        seen = self.calibration
        found = None if seen is None else _at(seen, paths)
        if found is None:
            lacks = f" (there is one of {', '.join(sorted(seen)[:3])} ...)" if seen else ""
            raise ValueError(
                f"{path}: {scheme} needs the calibrated range of its input{lacks}. Pass "
                "calibration=fdq.calibrate(model, tokens), use dynamic activations (drop "
                "'-static'), or leave this tensor out by a rule."
            )
        try:
            absmax = np.asarray(found, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the absmax of its input is no number: {error}.") from None
        if absmax.shape in ((shape[-2],), (*lead, shape[-2])):  # per channel
            absmax = absmax.max(axis=-1)
        if absmax.shape not in ((), lead):
            raise ValueError(
                f"{path}: expected the absmax of its input as one number, by channel [{shape[-2]}] "
                f"or by layer {list(lead)}, found shape {list(absmax.shape)}."
            )
        if not (np.isfinite(absmax) & (absmax >= 0)).all():
            raise ValueError(f"{path}: the absmax of its input is {absmax}; expected numbers >= 0.")
        # An input that was always 0 still needs a scale that can be divided by.
        scale = np.maximum(absmax, 1e-10) / np.float32(spec.bound)
        return jnp.asarray(np.broadcast_to(scale, lead), jnp.float32)

    def free(self, array: Any) -> None:
        if self.donate and isinstance(array, jax.Array) and hasattr(array, "delete"):
            array.delete()


def _at(values: Mapping[str, Any], paths: list[str]) -> Any:
    """The entry of a tensor, under a path of its own or of its module; None without one."""
    for path in paths:
        for key in (path, path.rpartition(".")[0]):
            if key in values:
                return values[key]
    return None


def _quantize_tree(tree: Any, table: MatchTable, work: _Work) -> Any:
    """The tree with QTensors where the table has a scheme; a leaf used twice is quantized once."""
    leaves, treedef = jax.tree_util.tree_flatten(tree, is_leaf=assignment.is_leaf)
    uses = collections.Counter(id(x) for x in leaves)
    made: dict[tuple[int, Any], QTensor] = {}
    for i, (source, row) in enumerate(zip(list(leaves), table.rows, strict=True)):
        if row.scheme is None:
            continue
        array = source.get_value() if isinstance(source, nnx.Variable) else source
        key = (id(source), row.scheme.weight)
        if key not in made:
            made[key] = work.quantize(array, row.scheme, [row.path])
        leaves[i] = made[key]
        uses[id(source)] -= 1
        if not uses[id(source)]:
            work.free(array)
    return jax.tree_util.tree_unflatten(treedef, leaves)
