"""`fdq.quantize` for anyone's Flax NNX module: which layers are replaced, and by what.

The Variables of a clone of the module (which shares the arrays of the original) are collected with
every path that leads to them, so one that is used in two places is quantized once and stays shared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx
from jax import lax

from fdq import nn
from fdq.formats.qtensor import QCodes, QScale, QTensor, QuantizedWeight
from fdq.nn import general, subclasses
from fdq.schemes.assignment import Leaf, MatchTable, Row, is_float
from fdq.schemes.scheme import Scheme

DEFAULTS_OF_MODULES = (
    "By default those are the kernels of fdq.nn's layers and of nnx.Linear, LinearGeneral and "
    "Einsum."
)

_PLAIN = general.Fold((0, 1), 1)


@dataclasses.dataclass(frozen=True)
class Use:
    """One reference to a tensor: `owner.attribute` at `path`, inside `module` (often the owner)."""

    path: str
    owner: Any
    attribute: str
    module: Any


@dataclasses.dataclass(frozen=True)
class Role:
    """What the owner of a tensor does with it, where it is a weight that can be quantized.

    `fold` is how the tensor becomes `[..., K, N]`; `stand_in` is what replaces the owner, None
    where the owner itself can hold a QTensor, for which its class may have to derive from `base`.
    `activations` says whether its input can be quantized.
    """

    kind: Literal["weight", "on_request"]
    fold: general.Fold
    stand_in: type[general.Quantized] | None = None
    base: type | None = None
    activations: bool = True


_IN_PLACE = {
    (nn.Linear, "kernel"): Role("weight", _PLAIN),
    (nn.ExpertLinear, "kernel"): Role("weight", _PLAIN),
    (nn.Embedding, "embedding"): Role("on_request", _PLAIN, activations=False),
    (nnx.LoRALinear, "kernel"): Role("weight", _PLAIN, base=subclasses.LinearBase),
}
_EMBED = Role("on_request", _PLAIN, base=subclasses.EmbedBase, activations=False)
_SUBCLASS = Role("on_request", _PLAIN, base=subclasses.LinearBase)
_RAW = Role("on_request", _PLAIN, activations=False)
_LINEN = Role("on_request", _PLAIN, base=subclasses.ToNNXBase, activations=False)


@dataclasses.dataclass
class Tensor:
    """A Variable (or QTensor, or array) of a module with all its uses, in order of discovery."""

    content: Any
    uses: list[Use]


def collect(module: Any) -> list[Tensor]:
    """Every tensor of a module, once, except the state of random number generators."""
    found: dict[int, Tensor] = {}
    active: set[int] = set()

    def visit(value: Any, path: str, owner: Any, attribute: str, module: Any) -> None:
        if isinstance(value, nnx.RngState) or id(value) in active:
            return
        if isinstance(value, (nnx.Variable, QuantizedWeight, jax.Array)):
            use = Use(path, owner, attribute, module)
            found.setdefault(id(value), Tensor(value, [])).uses.append(use)
            return
        active.add(id(value))
        for name, child in children(value):
            inner = value if isinstance(value, nnx.Pytree) else module
            visit(child, f"{path}.{name}" if path else name, value, name, inner)
        active.discard(id(value))

    visit(module, "", None, "", module)
    return list(found.values())


def children(value: Any) -> list[tuple[str, Any]]:
    """Attributes of a module in the order of `nnx.state`, items of a container; else nothing."""
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
    array = _array(tensor.content)

    def fixed(shape: tuple[int, ...], dtype: Any, why: str) -> Leaf:
        return Leaf(first.path, shape, dtype, "fixed", why, aliases)

    if isinstance(array, QuantizedWeight):
        return fixed(array.shape, array.code_dtype, f"is quantized ({array.spec})")
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return fixed((), None, type(array).__name__)
    shape, dtype = tuple(array.shape), array.dtype
    if not is_float(dtype):
        return fixed(shape, dtype, f"dtype {dtype}")
    found = [(use, role_of(use)) for use in tensor.uses]
    roles = [role for _, role in found if isinstance(role, Role)]
    for use, why in found:
        if isinstance(why, Role):
            continue
        if roles:
            why = f"shared with {use.path} ({why})"
        elif len(shape) < 2:
            why = "vector" if shape else "scalar"
        return fixed(shape, dtype, why)
    if len(shape) < 2:
        return fixed(shape, dtype, "vector" if shape else "scalar")
    if roles[0].fold == _PLAIN and roles[0].kind == "on_request":
        *lead, k, n = shape
        if math.prod(lead) > k:
            return fixed(shape, dtype, f"would be {math.prod(lead)} matrices [{k}, {n}]")
    if len({role.fold for role in roles}) > 1:
        return fixed(shape, dtype, f"shared with {others[0].path}, which contracts other axes")
    folded = roles[0].fold.shape(shape)
    if any(role.kind == "weight" for role in roles):
        return Leaf(first.path, folded, dtype, "weight", "", aliases)
    why = f"{general.name_of(type(first.module))}: needs a rule that names it"
    if roles[0] == _RAW:
        why = f"{why}, used as x @ {first.attribute}"
    return Leaf(first.path, folded, dtype, "on_request", why, aliases)


def role_of(use: Use) -> Role | str:
    """What a tensor is to its owner, or why it cannot be quantized there."""
    if (type(use.owner), use.attribute) in _IN_PLACE:
        return _IN_PLACE[type(use.owner), use.attribute]
    if use.attribute == "bias":
        return "bias"
    if isinstance(use.module, nnx.bridge.ToNNX):
        return _LINEN
    if isinstance(use.owner, nnx.Embed) and use.attribute == "embedding":
        return _EMBED
    found = general.fold_of(use.owner)
    if isinstance(found, str):
        kind, held = type(use.owner), getattr(use.owner, use.attribute, None)
        own = kind.__module__.split(".")[0] not in ("flax", "fdq")
        if own and isinstance(use.owner, nnx.Linear) and use.attribute == "kernel":
            if use.owner.dot_general is not lax.dot_general:
                return f"{kind.__name__}: has a dot_general of its own"
            return _SUBCLASS
        if own and isinstance(use.owner, nnx.Module) and isinstance(held, nnx.Param):
            return _RAW
        return found
    if use.attribute != "kernel":
        return f"{use.attribute}: not quantized"
    return Role("weight", *found)


def quantizes_activations(tensor: Tensor) -> bool:
    """Whether what multiplies by a tensor, or one of several, can quantize its input."""
    roles = map(role_of, tensor.uses)
    return any(isinstance(role, Role) and role.activations for role in roles)


def quantize_module(
    module: Any,
    tensors: list[Tensor],
    table: MatchTable,
    *,
    quantize: Callable[[Any, Row, list[str]], QTensor],
    activation_scale: Callable[[Scheme, list[str], tuple[int, ...], bool], Any],
    donate: bool = False,
) -> Any:
    """Puts quantized weights into a module; returns it, or its stand-in where it is a layer itself.

    The module, in which `collect` found `tensors`, is changed in place, so pass a clone; an
    abstract one (`nnx.eval_shape`) stays abstract. `quantize` takes a folded array, its row of the
    table and its paths. `donate` frees each source array once it is quantized.
    """
    stand_ins: dict[int, Any] = {}
    pending = list(zip(tensors, table.rows, strict=True))
    kept = {id(_array(tensor.content)) for tensor, row in pending if row.scheme is None}
    for tensor, row in pending:
        if row.scheme is None:
            continue
        source, scheme, array = tensor.content, row.scheme, _array(tensor.content)
        role = role_of(tensor.uses[0])
        assert isinstance(role, Role)
        q = quantize(role.fold(array), row, [use.path for use in tensor.uses])
        box = _boxed(q, source, role.fold)
        abstract = isinstance(array, jax.ShapeDtypeStruct)
        owners: dict[int, Any] = {id(use.owner): use.owner for use in tensor.uses}
        for owner in owners.values():
            uses = [use for use in tensor.uses if use.owner is owner]
            role, scale = role_of(uses[0]), None
            assert isinstance(role, Role)
            if scheme.activation is not None and role.activations:
                # One scale serves all experts; stacked layers have one each.
                shape = row.shape[-2:] if isinstance(owner, nn.ExpertLinear) else row.shape
                number = activation_scale(scheme, [use.path for use in uses], shape, abstract)
                scale = None if number is None else nn.ActivationScale(number)
            if role.stand_in is not None:
                stand_ins[id(owner)] = role.stand_in(owner, box, scheme.activation, scale)
                continue
            _put(owner, uses[0].attribute, box)
            if role.base is not None:
                holder = uses[0].module
                if not isinstance(holder, role.base):
                    holder.__class__ = subclasses.holding(type(holder), role.base)
                if role.base is not subclasses.ToNNXBase:
                    holder.kernel_dtype = str(row.dtype)
            if role.activations:
                holder = uses[0].module
                holder.activation, holder.activation_scale = scheme.activation, nnx.data(scale)
        tensor.content = None
        if donate and isinstance(array, jax.Array) and id(array) not in kept:
            array.delete()
    return substituted(module, stand_ins)


def _put(owner: Any, name: str, box: QTensor) -> None:
    if isinstance(owner, dict):
        owner[name] = box
    else:
        setattr(owner, name, box)


def _array(content: Any) -> Any:
    return content.get_value() if isinstance(content, nnx.Variable) else content


def substituted(value: Any, stand_ins: dict[int, Any], seen: set[int] | None = None) -> Any:
    """`value` with stand-ins, by `id` of their sources; modules are changed in place."""
    seen = set() if seen is None else seen
    if id(value) in stand_ins:
        return stand_ins[id(value)]
    if id(value) in seen:
        return value
    if isinstance(value, nnx.Pytree):
        seen.add(id(value))
        for name, child in children(value):
            new = substituted(child, stand_ins, seen)
            if new is not child:
                setattr(value, name, nnx.data(new))
    elif isinstance(value, (dict, list, tuple)):
        items = [substituted(child, stand_ins, seen) for _, child in children(value)]
        if any(new is not old for new, (_, old) in zip(items, children(value), strict=True)):
            if isinstance(value, dict):
                return type(value)(zip(value, items, strict=True))
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _boxed(q: QTensor, source: nnx.Variable, fold: general.Fold) -> QTensor:
    """`q` in Variables that keep the kernel's sharding names, where its axes still exist."""
    metadata = source.get_metadata() if isinstance(source, nnx.Variable) else {}
    names: tuple[Any, ...] = tuple(metadata.get("out_sharding") or ())
    kept = {k: v for k, v in metadata.items() if k in ("mesh", "sharding_rules", "eager_sharding")}
    shape = q.shape
    plain = fold == _PLAIN and len(names) == len(shape)
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
    return q.replace(**fields)


def _divisible(names: tuple, shape: tuple[int, ...], mesh: Any) -> tuple:
    """Names of mesh axes that divide their axis; others become None (replicated)."""
    sizes = {} if mesh is None else dict(mesh.shape)

    def fits(name: Any, size: int) -> bool:
        parts = name if isinstance(name, tuple) else (name,)
        return size % math.prod(sizes.get(part, 1) for part in parts) == 0

    return tuple(name if fits(name, n) else None for name, n in zip(names, shape, strict=True))
