"""How modules hold quantized weights, and how a module becomes a pure pytree and back.

Inside a module a `QTensor`'s fields are `nnx.Variable`s of their own types, never `nnx.Param`
(an optimizer would allocate moments for integers); in pure functions they are arrays. `split`
and `bind` lead from the one to the other: `bind(*split(module))` behaves like `module`.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from fdq.formats.qtensor import QuantizedWeight
from fdq.ops.placement import leading_axes
from fdq.schemes.path_pattern import path_keys


class ActivationScale(nnx.Variable):
    """The calibrated (static) scale of a module's input, float32."""


class CacheScale(nnx.Variable):
    """A calibrated (static) scale or zero point of the keys or values that a layer stores."""


def value(x: Any) -> Any:
    """The array of a Variable, the QTensor of arrays of a QTensor; anything else as it is."""
    if isinstance(x, nnx.Variable):
        held = x.get_raw_value()
        # `get_value` copies a tree of one array, which a step from the host does for every one.
        plain = isinstance(held, jax.Array) and not isinstance(held, Tracer | jax.Ref)
        return held if plain and not x.has_metadata("on_get_value") else x.get_value()
    if isinstance(x, QuantizedWeight):
        return x.replace(**{name: value(array) for name, array in x.arrays().items()})
    return x


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """A module without its arrays: hashable, so that `jax.jit` can take it as a static argument.

    Two modules with the same attributes and the same tree have equal templates, and whatever was
    compiled for the one serves the other. Leaves are Variables and whole QTensors: `paths` are the
    keys that lead to them, `kinds` types of Variables, None for a QTensor or a bare array.
    """

    treedef: Any
    paths: tuple[tuple[str, ...], ...]
    kinds: tuple[type | None, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.treedef, self.paths, self.kinds))

    def __hash__(self) -> int:
        """Kept: it takes longer than the call of a small compiled step."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether all three are equal."""
        if self is other:
            return True
        if not isinstance(other, Template) or hash(self) != hash(other):
            return False
        mine, theirs = (vars(t) for t in (self, other))
        return all(mine[name] == theirs[name] for name in ("kinds", "paths", "treedef"))


def split(module: nnx.Module) -> tuple[Template, dict]:
    """The module as `(template, params)`: what is static, and a nested dict of its arrays.

    Args:
      module: any NNX module; its Variables may hold arrays, tracers or ShapeDtypeStructs.

    Returns:
      The template, and nested dicts keyed by attribute name or list index, both as strings (so that
      any store and `jax.export` take them), whose leaves are arrays and QTensors of arrays. A few
      milliseconds at 640 Variables, against 55 for `nnx.split`.
    """
    _note_experts(module)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        module, is_leaf=lambda x: isinstance(x, nnx.Variable | QuantizedWeight)
    )
    paths = tuple(tuple(map(str, path_keys(entries))) for entries, _ in leaves)
    kinds = tuple(type(leaf) if isinstance(leaf, nnx.Variable) else None for _, leaf in leaves)
    template = Template(treedef, paths, kinds)
    return template, _nested(paths, [value(leaf) for _, leaf in leaves])


def _note_experts(module: Any) -> None:
    """Tells layers of experts over which mesh axes these are sharded, where that can be seen."""
    waiting, seen = [module], set()
    while waiting:
        node = waiting.pop()
        held = vars(node)
        if id(node) in seen:
            continue
        seen.add(id(node))
        waiting += [
            child
            for child in held.values()
            if isinstance(child, nnx.Pytree) and not isinstance(child, nnx.Variable)
        ]
        if "expert_axes" not in held:
            continue
        kernel = value(held["kernel"])
        first = jax.tree.leaves(kernel)[0]
        if isinstance(first, jax.Array) and not isinstance(first, Tracer):
            axes = ",".join(leading_axes(kernel)[1])
            if axes != held["expert_axes"]:
                node.expert_axes = axes


def _nested(paths: Iterable[tuple[str, ...]], values: Iterable[Any]) -> dict:
    params: dict = {}
    for path, leaf in zip(paths, values, strict=True):
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def bind(template: Template, params: dict) -> Any:
    """The module of `template` with the arrays of `params`; to be called inside `jax.jit`.

    Both are from `split`; an array may have become a QTensor and the other way round, and a QTensor
    may have another layout. List indices may be integers (`nnx.to_pure_dict`).

    Raises:
      ValueError: `params` lacks a leaf of the module.
    """
    leaves = []
    for path, kind in zip(template.paths, template.kinds, strict=True):
        node: Any = params
        for key in path:
            if isinstance(node, dict) and key not in node and key.isdigit():
                key = int(key)
            if not isinstance(node, dict) or key not in node:
                name = ".".join(path)
                raise ValueError(f"params lack {name}; expected the tree that fdq.nn.split made")
            node = node[key]
        is_array = not isinstance(node, QuantizedWeight)
        leaves.append(kind(node) if kind is not None and is_array else node)
    return template.treedef.unflatten(leaves)


# Attributes that say nothing about arrays, and may be compared by identity and held for long.
_PLAIN = (bool, int, float, str, type(None), type, np.dtype, types.FunctionType)


class _Seen:
    """The structure of a module as `split` found it, without its arrays.

    Holds no module and no array, so it neither keeps memory nor goes stale: `params` compares every
    attribute of every module in it with what was there, and reads the arrays anew.
    """

    def __init__(self, module: nnx.Module, template: Template):
        self.template = template
        self.nodes: list[tuple[int, str, type, tuple[tuple[str, Any], ...]]] = []
        self.leaves: list[tuple[int, str, type]] = []
        paths: list[tuple[str, ...]] = []
        self._add(module, 0, "", (), paths)
        order = {path: at for at, path in enumerate(paths)}
        if len(order) != len(paths) or set(order) != set(template.paths):
            raise TypeError("not every array is an attribute of a module")
        self.order = [order[path] for path in template.paths]

    def _add(
        self, node: Any, parent: int, name: str, path: tuple[str, ...], paths: list[tuple[str, ...]]
    ) -> None:
        attributes = []
        own = len(self.nodes)
        self.nodes.append((parent, name, type(node), ()))
        for key, attribute in vars(node).items():
            if isinstance(attribute, nnx.Variable | QuantizedWeight):
                attributes.append((key, _Child))
                self.leaves.append((own, key, type(attribute)))
                paths.append((*path, key))
            elif isinstance(attribute, nnx.Pytree):
                attributes.append((key, _Child))
                self._add(attribute, own, key, (*path, key), paths)
            elif key.startswith("_pytree__"):
                attributes.append((key, _Child))  # what follows from the other attributes
            elif isinstance(attribute, _PLAIN) or _is_frozen(attribute):
                attributes.append((key, attribute))
            else:
                raise TypeError(f"{key} is a {type(attribute).__name__}")
        self.nodes[own] = (parent, name, type(node), tuple(attributes))

    def params(self, module: nnx.Module) -> dict | None:
        """The arrays of the module; None if anything else about it has changed."""
        found: list[dict[str, Any]] = []
        for parent, name, kind, attributes in self.nodes:
            node = found[parent][name] if found else module
            if type(node) is not kind:
                return None
            held = vars(node)
            if len(held) != len(attributes):
                return None
            for (key, attribute), (now, other) in zip(held.items(), attributes, strict=True):
                if key != now or (attribute is not other and other is not _Child):
                    return None
            found.append(held)
        values = []
        for own, name, kind in self.leaves:
            leaf = found[own][name]
            if type(leaf) is not kind:
                return None
            values.append(value(leaf))
        return _nested(self.template.paths, [values[at] for at in self.order])


def _is_frozen(attribute: Any) -> bool:
    parameters = getattr(type(attribute), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


class _Child:
    """Stands for an attribute that is a module, a Variable or a QTensor."""


_SEEN: weakref.WeakKeyDictionary[Any, _Seen | None] = weakref.WeakKeyDictionary()


def current_split(module: nnx.Module) -> tuple[Template, dict]:
    """`split`, faster from the second call with the same module on: a fraction of a millisecond.

    Whatever has changed in the module counts: its structure is compared, its arrays are read.
    """
    try:
        seen = _SEEN.get(module)
    except TypeError:  # a class that compares by value has no hash: it is split at each call
        return split(module)
    params = None if seen is None else seen.params(module)
    if seen is not None and params is not None:
        return seen.template, params
    template, params = split(module)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        return template, params
    try:
        _SEEN[module] = _Seen(module, template)
    except TypeError:  # a module of other parts: it is split at each call
        _SEEN.pop(module, None)
    return template, params
