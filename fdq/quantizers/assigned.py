"""A recipe brought to a model: which tensor gets which scheme by which quantizer; and doing it."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from fdq.cache.kv_cache import abstract_scales
from fdq.formats import FORMATS
from fdq.formats.folded import FoldedWeight
from fdq.quantizers import modules
from fdq.quantizers.fastdeploy_rounding import FASTDEPLOY
from fdq.quantizers.layer_inputs import LayerInputs
from fdq.quantizers.quantizer import pick
from fdq.quantizers.weight import quantize_array
from fdq.schemes import assignment
from fdq.schemes.assignment import Leaf, MatchTable, Row
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import CacheSpec, Scheme


@dataclasses.dataclass(frozen=True)
class Assigned:
    """What is to become of each tensor of a tree, or of a clone of a module: the `target`.

    `tensors` are those of a module (None for a tree), `leaves` what the recipe looked at, `table`
    what it says of each. `method` quantizes where no rule says how, `compat` where FastDeploy can.
    """

    target: Any
    tensors: list[modules.Tensor] | None
    leaves: list[Leaf]
    recipe: Recipe
    table: MatchTable
    method: str | None
    compat: str | None

    @classmethod
    def of(
        cls,
        target: Any,
        scheme: Any,
        *,
        compat: str | None = None,
        rules: Any = None,
        method: str | None = None,
    ) -> Assigned:
        """Matches a tree or module with whatever names a recipe, as `quantize` documents it."""
        tensors, hint = None, assignment.DEFAULTS_OF_TREES
        if isinstance(target, nnx.Pytree):
            target, hint = nnx.clone(target), modules.DEFAULTS_OF_MODULES
            tensors = modules.collect(target)
            leaves = [modules.describe(tensor) for tensor in tensors]
        else:
            leaves = assignment.leaves_of(target)
        has_experts = any("experts" in leaf.path.split(".") for leaf in leaves)
        recipe = parse(scheme, rules, compat, has_experts=has_experts)
        axes = [rule.pattern for rule in recipe.rules if rule.contract is not None]
        if tensors is not None and axes:
            raise ValueError(
                f"Rule {axes[0]!r}: contract= is for plain trees. Layers of a module know their "
                "axes, and raw params that a rule names are read as [..., K, N]."
            )
        note = activation_note(recipe) if tensors is None else ""
        table = assignment.assign(recipe, leaves, hint=hint, note=note)
        if tensors is not None:
            table = _without_activations(table, tensors)
        for row in table.quantized:
            if compat is None or row.quantizer is not None:
                assert row.scheme is not None and row.scheme.weight is not None
                pick(row.scheme.weight, row.quantizer or method, row.path, row.dtype)
        return cls(target, tensors, leaves, recipe, table, method, compat)

    def quantize(self, inputs: LayerInputs, *, donate: bool = False) -> Any:
        """The tree or module with QTensors where the table says so."""
        if self.tensors is None:
            return self._quantize_tree(inputs, donate)
        result = modules.quantize_module(
            self.target,
            self.tensors,
            self.table,
            quantize=functools.partial(self.tensor, inputs=inputs),
            activation_scale=inputs.activation_scale,
            donate=donate,
        )
        if hasattr(result, "recipe_record") and hasattr(result, "scheme"):
            result.scheme, result.recipe_record = str(self.recipe), self.recipe.to_json()
        _keep_cache_scales(result, self.recipe.cache, inputs)
        return result

    @functools.cached_property
    def rows(self) -> Mapping[str, tuple[Row, list[str]]]:
        """Of each tensor that is quantized its row and all of its paths, by each of these."""
        return {
            path: (row, [leaf.path, *leaf.aliases])
            for leaf, row in zip(self.leaves, self.table.rows, strict=True)
            if row.scheme is not None
            for path in (leaf.path, *leaf.aliases)
        }

    def tensor(
        self,
        array: Any,
        row: Row,
        paths: list[str],
        *,
        inputs: LayerInputs,
        index: int | None = None,
    ) -> Any:
        """Quantizes one tensor, `[..., K, N]`, or one matrix of its stack: that of `index`.

        Any of `paths`, which all lead to it, may have statistics. Where a rule says that it
        contracts other axes than `[..., K, N]`, the whole of it becomes a `FoldedWeight`.
        """
        if row.fold is not None:
            sizes = tuple(array.shape[array.ndim - len(row.fold.order) :])
            array = array if hasattr(array, "dtype") else np.asarray(array)
            plain = dataclasses.replace(row, fold=None)
            q = self.tensor(row.fold(array), plain, paths, inputs=inputs)
            return FoldedWeight(q, row.fold, sizes)
        assert row.scheme is not None and row.scheme.weight is not None
        theirs = row.quantizer is None and fastdeploy_has(row.scheme, array.dtype)
        return quantize_array(
            array,
            row.scheme.weight,
            method=row.quantizer or self.method,
            compat=self.compat if theirs else None,
            statistics=inputs.statistics(paths, index),
            path=row.path,
        )

    def columns_apart(self, row: Row) -> bool:
        """Whether slabs of 128 columns of a weight quantize to those of the whole."""
        assert row.scheme is not None and row.scheme.weight is not None
        spec = row.scheme.weight
        if row.quantizer is None and self.compat is not None:
            return FORMATS[spec.format].columns_apart(spec)
        quantizer = pick(spec, row.quantizer or self.method, row.path, row.dtype)
        return quantizer.columns_apart and FORMATS[spec.format].columns_apart(spec)

    def _quantize_tree(self, inputs: LayerInputs, donate: bool) -> Any:
        """A leaf used twice is quantized once."""
        leaves, treedef = jax.tree_util.tree_flatten(self.target, is_leaf=assignment.is_leaf)
        uses = collections.Counter(id(x) for x in leaves)
        made: dict[tuple[Any, ...], Any] = {}
        for i, (source, row) in enumerate(zip(list(leaves), self.table.rows, strict=True)):
            if row.scheme is None:
                continue
            array = source.get_value() if isinstance(source, nnx.Variable) else source
            key = (id(source), row.scheme.weight, row.quantizer, row.fold)
            if key not in made:
                made[key] = self.tensor(array, row, [row.path], inputs=inputs)
            leaves[i] = made[key]
            uses[id(source)] -= 1
            if donate and not uses[id(source)] and isinstance(array, jax.Array):
                array.delete()
        return jax.tree_util.tree_unflatten(treedef, leaves)


def activation_note(recipe: Recipe) -> str:
    """What to say where quantized activations have no layer to be part of."""
    schemes = [recipe.default, *(rule.scheme for rule in recipe.rules)]
    found = {s.activation for s in schemes if s is not None and s.activation is not None}
    if not found:
        return ""
    names = ", ".join(sorted(map(str, found)))
    return (
        f"A tree has no layers: activations ({names}) are not quantized by it; pass "
        "fdq.matmul(x, q, activation=...)."
    )


def _without_activations(table: MatchTable, tensors: list[modules.Tensor]) -> MatchTable:
    """The table, which says of which weights quantized activations are no part."""
    rows, names = [], []
    for row, tensor in zip(table.rows, tensors, strict=True):
        spec = None if row.scheme is None else row.scheme.activation
        if row.scheme is not None and spec and not modules.quantizes_activations(tensor):
            names.append(row.path)
            scheme = dataclasses.replace(row.scheme, activation=None)
            row = dataclasses.replace(row, scheme=scheme, reason=f"{row.reason}, without {spec}")
        rows.append(row)
    if not names:
        return table
    note = (
        f"Activations are not quantized where fdq does not form the product: {', '.join(names)}. "
        "Rows of an embedding are looked up; with raw params use fdq.matmul(x, w, activation=...)."
    )
    return dataclasses.replace(table, rows=tuple(rows), note=note)


def parse(scheme: Any, rules: Any, compat: str | None, has_experts: bool) -> Recipe:
    """The recipe of `scheme`, with more `rules` ahead of its own."""
    recipe = Recipe.parse(scheme, compat=compat, has_experts=has_experts)
    if rules is None:
        return recipe
    extra = Recipe.parse(rules) if isinstance(rules, Mapping) else Recipe(rules)
    if extra.default is not None or extra.cache is not None:
        raise ValueError(
            "rules= go ahead of those of the scheme: they have no '*' and no cache. Put these into "
            "the scheme."
        )
    fields = {"cache": recipe.cache, "quantizer": recipe.quantizer, "record": recipe.record}
    return Recipe((*extra.rules, *recipe.rules), recipe.default, **fields)


def fastdeploy_has(scheme: Scheme, dtype: Any) -> bool:
    """Whether FastDeploy rounds this tensor in a way of its own (WINT8, WINT4, W8A8, W4A8)."""
    if scheme.weight is None or FASTDEPLOY.unsupported(scheme.weight, dtype) is not None:
        return False
    return scheme.activation is None or scheme.activation.format == "int8"


def _keep_cache_scales(model: Any, cache: CacheSpec | None, inputs: LayerInputs) -> None:
    """Gives a model that can keep them the scales of a static KV cache (`set_cache_scales`).

    Without calibration a concrete model gets none: `KVCache.init` can be given others, and says so
    where it is not. An abstract model that has a `config` gets their shapes.
    """
    if cache is None or not cache.calibrated or not hasattr(model, "set_cache_scales"):
        return
    seen, config = inputs.calibration, getattr(model, "config", None)
    scales = None if seen is None else seen.cache_scales(cache)
    leaves = jax.tree.leaves(nnx.state(model))
    if scales is None and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        scales = None if config is None else abstract_scales(config, cache)
    if scales is not None:
        model.set_cache_scales(scales)
