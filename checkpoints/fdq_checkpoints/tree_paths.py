"""Pytrees and Flax modules as flat lists of named tensors, and back.

A path is a tuple of strings, printed with dots (`layers.0.self_attn.qkv_proj.kernel`). A
`QTensor` (or `FoldedWeight`) is one tensor whatever arrays it has, so that its static part travels
with it: Orbax would drop it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import QTensor, QuantizedWeight
from fdq.schemes.path_pattern import path_keys
from fdq.schemes.recipe import Recipe
from fdq.schemes.scheme import ActivationSpec, Scheme
from fdq_checkpoints.errors import CheckpointError, nearest

Path = tuple[str, ...]
QUANTIZED = (QTensor, FoldedWeight)
"""What stands for a weight in a checkpoint."""

_HELD = (QuantizedWeight, FoldedWeight)  # prepared ones too


def dotted(path: Iterable[str]) -> str:
    """`("layers", "0", "kernel")` as `"layers.0.kernel"`."""
    return ".".join(path)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A named array, `jax.ShapeDtypeStruct` or quantized weight; `activation` as its module has."""

    path: Path
    value: Any
    activation: ActivationSpec | None = None


def flatten(tree: Any) -> list[Tensor]:
    """All tensors of an NNX module (each shared one once) or of any pytree, in tree order."""
    if isinstance(tree, nnx.Module):
        tensors = _flatten_module(tree)
    else:
        tensors = [Tensor(path or ("value",), _raw(x)) for path, x in _pytree_leaves(tree)[0]]
    check_distinct(tensor.path for tensor in tensors)
    for tensor in tensors:
        for array in arrays_of(tensor.value).values():
            if not (hasattr(array, "shape") and hasattr(array, "dtype")):
                raise CheckpointError(
                    f"{dotted(tensor.path)}: expected an array, found {type(array).__name__}."
                )
            if getattr(array.dtype, "kind", "") in tuple("OSTUMm"):
                raise CheckpointError(
                    f"{dotted(tensor.path)}: expected an array of numbers, found {array.dtype}."
                )
    return tensors


def check_distinct(paths: Iterable[Path], what: str = "") -> None:
    """CheckpointError where two paths read alike: Orbax, too, keeps one array of such two."""
    seen: set[str] = set()
    for path in paths:
        if (name := dotted(path)) in seen:
            raise CheckpointError(
                f"{what}{name}: two leaves have this path once keys are strings with dots between "
                "them, and only one of them can be stored. Rename one."
            )
        seen.add(name)


def fill(tree: Any, values: Mapping[Path, Any]) -> Any:
    """`tree` with every tensor replaced by `values[path]`, a QTensor where it has a QTensor."""
    paths = [tensor.path for tensor in flatten(tree)]
    check_same_paths(expected=paths, found=list(values), what="the checkpoint")
    if isinstance(tree, nnx.Module):
        return _fill_module(tree, values)
    entries, structure = _pytree_leaves(tree)
    return jax.tree_util.tree_unflatten(structure, [values[path] for path, _ in entries])


def check_same_paths(*, expected: Iterable[Path], found: Iterable[Path], what: str) -> None:
    """Raise `CheckpointError` naming the first tensors that are missing or too many."""
    expected_names = {dotted(path) for path in expected}
    found_names = {dotted(path) for path in found}
    missing = sorted(expected_names - found_names)
    extra = sorted(found_names - expected_names)
    if missing:
        raise CheckpointError(
            f"{what} has no tensor {missing[0]}{_and_more(missing)}."
            f"{nearest(missing[0], extra or found_names)}"
        )
    if extra:
        raise CheckpointError(
            f"{what} has a tensor {extra[0]}{_and_more(extra)} that is not expected."
            f"{nearest(extra[0], expected_names)}"
        )


def arrays_of(value: Any) -> dict[str, Any]:
    """The arrays of a QTensor by field name, or the array itself under `"value"`."""
    return value.arrays() if isinstance(value, QUANTIZED) else {"value": value}


def with_arrays(value: Any, arrays: Mapping[str, Any]) -> Any:
    """The inverse of `arrays_of`: `value` with other arrays of the same names."""
    return value.replace(**arrays) if isinstance(value, QUANTIZED) else arrays["value"]


def map_arrays(function: Callable[[Path, Any], Any], tensor: Tensor) -> Any:
    """The tensor's value with `function(path of the array, array)` applied to its arrays."""
    arrays = {
        name: function(array_path(tensor.path, name), array)
        for name, array in arrays_of(tensor.value).items()
    }
    return with_arrays(tensor.value, arrays)


def exact_recipe(schemes: Mapping[Path, Scheme]) -> Recipe:
    """A recipe that stores each of these tensors as said, and leaves all others."""
    rules = []
    for path, scheme in schemes.items():
        pattern = "".join(f"[{char}]" if char in "*?[{" else char for char in dotted(path))
        rules.append((pattern, scheme))
    return Recipe(rules)


def array_path(path: Path, name: str) -> Path:
    """Where the array `name` of the tensor at `path` is in a tree of plain arrays."""
    return path if name == "value" else (*path, name)


def nested(values: Mapping[Path, Any]) -> dict[str, Any]:
    """A flat mapping as nested dicts; CheckpointError if a path leads through another's leaf."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{dotted(path)}: {key} is both a tensor and a folder.")
        if path[-1] in node:
            raise CheckpointError(f"{dotted(path)}: both a tensor and a folder.")
        node[path[-1]] = value
    return tree


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def path_of(entries: Iterable[Any]) -> Path:
    """A JAX key path as a path of strings."""
    return tuple(map(str, path_keys(entries)))


def _pytree_leaves(tree: Any) -> tuple[list[tuple[Path, Any]], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, (*_HELD, nnx.Variable))
    )
    return [(path_of(path), leaf) for path, leaf in leaves], structure


def _raw(leaf: Any) -> Any:
    """Plain arrays: a Variable's value; a QTensor in the canonical layout, which files have."""
    if isinstance(leaf, nnx.Variable):
        return leaf.get_value()
    return leaf.canonical() if isinstance(leaf, _HELD) else leaf


def _flatten_module(module: nnx.Module) -> list[Tensor]:
    quantized = {path: leaf for path, leaf in _pytree_leaves(module)[0] if isinstance(leaf, _HELD)}
    activations = {
        tuple(map(str, path)): node.activation
        for path, node in nnx.iter_graph(module)
        if isinstance(getattr(node, "activation", None), ActivationSpec)
    }
    values: dict[Path, Any] = {}
    for keys, variable in nnx.to_flat_state(nnx.state(module)):
        path = tuple(map(str, keys))
        # The state has each array of a QTensor; the first of them brings the whole QTensor.
        weight = next((one for one in (path[:-1], path[:-2]) if one in quantized), None)
        if weight is not None:
            values.setdefault(weight, _raw(quantized[weight]))
        else:
            values[path] = _raw(variable)
    return [
        Tensor(path, value, activations.get(path[:-1]) if isinstance(value, QUANTIZED) else None)
        for path, value in values.items()
    ]


def _fill_module(module: nnx.Module, values: Mapping[Path, Any]) -> nnx.Module:
    arrays = {
        array_path((*path, "q") if isinstance(value, FoldedWeight) else path, name): array
        for path, value in values.items()
        for name, array in arrays_of(value).items()
    }
    graph, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    filled = []
    for path, old in flat:
        new = arrays[tuple(map(str, path))]
        filled.append((path, old.replace(new) if isinstance(old, nnx.Variable) else new))
    return nnx.merge(graph, nnx.from_flat_state(filled))
