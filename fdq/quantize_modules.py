"""``fdq.quantize`` for anyone's Flax NNX module: which layers are replaced, and by what.

The module is cloned (Variables are new, arrays are shared with the original), its Variables are
collected with every path that leads to them, and those that the recipe picks are quantized one
after the other. ``fdq.nn.Linear`` and ``fdq.nn.ExpertLinear`` hold a QTensor in place of their
kernel; ``nnx.Linear``, ``LinearGeneral`` and ``Einsum`` are replaced wherever they are referenced.
A Variable used in two places is quantized once and stays shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq import nn
from fdq.assignment import Leaf, MatchTable, assign
from fdq.nn import general
from fdq.nn.parameters import QCodes, QScale
from fdq.qtensor import QTensor, materialize
from fdq.scheme import Scheme

_IN_PLACE = {(nn.Linear, "kernel"): "weight", (nn.ExpertLinear, "kernel"): "weight"}
_IN_PLACE[nn.Embedding, "embedding"] = "on_request"


@dataclasses.dataclass(frozen=True)
class Use:
    """One reference to a tensor: ``owner.attribute`` at ``path``."""

    path: str
    owner: Any
    attribute: str


@dataclasses.dataclass
class Tensor:
    """A Variable (or QTensor, or array) of a module with all its uses, in order of discovery."""

    content: Any
    uses: list[Use]


def collect(module: nnx.Module) -> list[Tensor]:
    """Every tensor of a module, once, except the state of random number generators."""
    found: dict[int, Tensor] = {}
    active: set[int] = set()

    def visit(value: Any, path: str, owner: Any, attribute: str) -> None:
        if isinstance(value, nnx.RngState) or id(value) in active:
            return
        if isinstance(value, (nnx.Variable, QTensor, jax.Array)):
            use = Use(path, owner, attribute)
            found.setdefault(id(value), Tensor(value, [])).uses.append(use)
            return
        active.add(id(value))
        for name, child in children(value):
            visit(child, f"{path}.{name}" if path else name, value, name)
        active.discard(id(value))

    visit(module, "", None, "")
    return list(found.values())


def children(value: Any) -> list[tuple[str, Any]]:
    """Attributes of a module, items of a container; nothing for other values.

    Attributes in the order of ``nnx.state``: a shared module has the path that it has there.
    """
    if isinstance(value, nnx.Pytree):
        named = ((k, v) for k, v in vars(value).items() if not k.startswith("_pytree__"))
        return sorted(named, key=lambda item: _natural(item[0]))
    if isinstance(value, dict):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [(str(i), v) for i, v in enumerate(value)]
    return []


def _natural(name: str) -> tuple[bool, int, str]:
    """Sorts numbers as numbers, ahead of names."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def describe(tensor: Tensor) -> Leaf:
    """What a recipe needs to know; the shape of a weight is the folded one."""
    first, *others = tensor.uses
    aliases = tuple(use.path for use in others)
    content = tensor.content
    array = content.get_value() if isinstance(content, nnx.Variable) else content
    if isinstance(array, QTensor):
        spec, codes = array.spec, materialize(array).codes
        why = f"is quantized ({spec})"
        return Leaf(first.path, array.shape, codes.dtype, "fixed", why, aliases)
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return Leaf(first.path, (), None, "fixed", type(array).__name__, aliases)
    shape, dtype = tuple(array.shape), array.dtype
    kinds, folds, reasons = set(), set(), []
    for use in tensor.uses:
        in_place = _IN_PLACE.get((type(use.owner), use.attribute))
        fold = None if in_place else general.fold_of(use.owner)
        if in_place:
            kinds.add(in_place)
            folds.add(general.Fold((0, 1), 1))
        elif use.attribute == "kernel" and not isinstance(fold, str) and fold is not None:
            kinds.add("weight")
            folds.add(fold[0])
        else:
            owner = fold if isinstance(fold, str) else f"{use.attribute}: not quantized"
            owner = "bias" if use.attribute == "bias" else owner
            reasons.append((use, owner))
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        return Leaf(first.path, shape, dtype, "fixed", f"dtype {dtype}", aliases)
    if reasons:
        use, owner = reasons[0]
        vector = "vector" if len(shape) == 1 else "scalar"
        why = owner if len(shape) > 1 else vector
        if kinds:
            why = f"shared with {use.path} ({owner})"
        return Leaf(first.path, shape, dtype, "fixed", why, aliases)
    if len(folds) > 1:
        why = f"shared with {others[0].path}, which contracts other axes"
        return Leaf(first.path, shape, dtype, "fixed", why, aliases)
    kind = "weight" if "weight" in kinds else "on_request"
    why = (
        ""
        if kind == "weight"
        else f"{general.name_of(type(first.owner))}: needs a rule that names it"
    )
    return Leaf(first.path, folds.pop().shape(shape), dtype, kind, why, aliases)


def quantize_module(
    module: nnx.Module,
    recipe: Any,
    *,
    quantize: Callable[[Any, Scheme, str], QTensor],
    activation_scale: Callable[[Scheme, list[str], tuple[int, ...], bool], Any],
    donate: bool = False,
) -> tuple[Any, MatchTable]:
    """A new module with quantized weights, and what became of each tensor.

    Args:
      module: any NNX module; abstract ones (``nnx.eval_shape``) stay abstract.
      recipe: a ``Recipe``.
      quantize: folded array, scheme and path -> QTensor.
      activation_scale: scheme, paths of one kernel, shape of the folded weight and whether it is
        abstract -> the calibrated scale of a static activation, or None.
      donate: frees each source array once it is quantized.
    """
    module = nnx.clone(module)
    tensors = collect(module)
    table = assign(recipe, [describe(tensor) for tensor in tensors])
    replaced: dict[int, Any] = {}
    pending = list(zip(tensors, table.rows, strict=True))
    kept = {id(_array(tensor.content)) for tensor, row in pending if row.scheme is None}
    for tensor, row in pending:
        if row.scheme is None:
            continue
        source, scheme = tensor.content, row.scheme
        array = _array(source)
        fold = _fold_of(tensor.uses[0])
        box = _boxed(quantize(fold(array), scheme, row.path), source, fold)
        abstract = isinstance(array, jax.ShapeDtypeStruct)
        for owner in {id(use.owner): use.owner for use in tensor.uses}.values():
            uses = [use for use in tensor.uses if use.owner is owner]
            attribute, scale = uses[0].attribute, None
            if scheme.activation is not None and attribute == "kernel":
                # One scale serves all experts; stacked layers have one each.
                shape = row.shape[-2:] if isinstance(owner, nn.ExpertLinear) else row.shape
                number = activation_scale(scheme, [use.path for use in uses], shape, abstract)
                scale = None if number is None else general.ActivationScale(number)
            if (type(owner), attribute) not in _IN_PLACE:
                replaced[id(owner)] = _replacement(owner, box, scheme.activation, scale)
                continue
            setattr(owner, attribute, box)
            if attribute == "kernel":
                owner.activation, owner.activation_scale = scheme.activation, nnx.data(scale)
        tensor.content = None
        if donate and isinstance(array, jax.Array) and id(array) not in kept:
            array.delete()
    return _substitute(module, replaced, set()), table


def _fold_of(use: Use) -> general.Fold:
    if (type(use.owner), use.attribute) in _IN_PLACE:
        return general.Fold((0, 1), 1)
    found = general.fold_of(use.owner)
    assert not isinstance(found, str)
    return found[0]


def _replacement(owner: Any, box: QTensor, activation: Any, scale: Any) -> nnx.Module:
    found = general.fold_of(owner)
    assert not isinstance(found, str)
    return found[1](owner, box, activation, scale)


def _array(content: Any) -> Any:
    return content.get_value() if isinstance(content, nnx.Variable) else content


def _substitute(value: Any, replaced: dict[int, Any], seen: set[int]) -> Any:
    """``value`` with replaced modules in place of their sources; modules are changed in place."""
    if id(value) in replaced:
        return replaced[id(value)]
    if id(value) in seen:
        return value
    if isinstance(value, nnx.Pytree):
        seen.add(id(value))
        for name, child in children(value):
            new = _substitute(child, replaced, seen)
            if new is not child:
                setattr(value, name, nnx.data(new))
    elif isinstance(value, (dict, list, tuple)):
        items = [_substitute(child, replaced, seen) for _, child in children(value)]
        if any(new is not old for new, (_, old) in zip(items, children(value), strict=True)):
            if isinstance(value, dict):
                return type(value)(zip(value, items, strict=True))
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _boxed(q: QTensor, source: nnx.Variable, fold: general.Fold) -> QTensor:
    """``q`` in Variables that keep the kernel's sharding names, where its axes still exist."""
    metadata = source.get_metadata() if isinstance(source, nnx.Variable) else {}
    names: tuple[Any, ...] = tuple(metadata.get("out_sharding") or ())
    kept = {k: v for k, v in metadata.items() if k in ("mesh", "sharding_rules", "eager_sharding")}
    shape = q.shape
    plain = fold == general.Fold((0, 1), 1) and len(names) == len(shape)
    fields = {}
    for name, array in q.arrays().items():
        extra = {}
        if plain:
            *lead, rows, columns = array.shape
            k_name = names[-2] if rows > 1 else None
            n_name = names[-1] if columns == shape[-1] else None
            wanted = (*names[: len(lead)], k_name, n_name)
            extra = {"out_sharding": _divisible(wanted, array.shape, kept.get("mesh")), **kept}
        fields[name] = (QCodes if name == "codes" else QScale)(array, **extra)
    return dataclasses.replace(q, **fields)


def _divisible(names: tuple, shape: tuple[int, ...], mesh: Any) -> tuple:
    """Names of mesh axes that divide their axis; others become None (replicated)."""
    sizes = {} if mesh is None else dict(mesh.shape)

    def fits(name: Any, size: int) -> bool:
        parts = name if isinstance(name, tuple) else (name,)
        total = 1
        for part in parts:
            total *= sizes.get(part, 1)
        return size % total == 0

    return tuple(name if fits(name, n) else None for name, n in zip(names, shape, strict=True))
