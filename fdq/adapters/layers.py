"""The linear layers of a module that adapters fit beside, and their parts, by path."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax import nnx

from fdq import models, nn
from fdq.nn import general
from fdq.nn.lora import WHOLE
from fdq.nn.parameters import value
from fdq.quantizers.modules import children
from fdq.schemes import path_pattern

# What the parts of fused layers are called where they are layers of their own.
_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns `[start, stop)` of a layer, with a name in it and a path that targets match."""

    name: str
    path: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer at its `paths`, whose folded kernel has a shape `[..., K, N]`.

    `adapters` are those that it has, by the names of its parts.
    """

    module: Any
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    adapters: Mapping[str, nn.LowRank]


def layers_of(module: Any) -> list[Layer]:
    """The linear layers of a module in order, one that is there twice once; see `fdq.lora`."""
    found: dict[int, Layer] = {}
    for path, name, node, owner in _walk(module):
        adapted = isinstance(node, nn.LoRA)
        layer = node.base_module if adapted else node
        if (known := found.get(id(layer))) is not None:
            found[id(layer)] = dataclasses.replace(known, paths=(*known.paths, path))
        elif (shape := shape_of(layer)) is not None:
            widths, start, parts = _widths(module, owner, path, name, shape[-1]), 0, []
            room = path.rpartition(".")[0]
            for part, width in widths:
                theirs = f"{room}.{part}" if room else part
                whole = path if part == WHOLE else theirs
                parts.append(Part(part, whole, start, start + width))
                start += width
            adapters = dict(node.adapters.items()) if adapted else {}
            found[id(layer)] = Layer(layer, (path,), shape, tuple(parts), adapters)
    return list(found.values())


def _walk(module: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """Path, attribute, module and owner of every module, each time that it is met.

    A layer with adapters is one module.
    """
    active: set[int] = set()

    def visit(node: Any, path: str, name: str, owner: Any) -> Iterator[tuple[str, str, Any, Any]]:
        if id(node) in active or isinstance(node, nnx.Variable):
            return
        if isinstance(node, nnx.Module):
            yield path, name, node, owner
        if isinstance(node, nn.LoRA):
            return
        active.add(id(node))
        for key, child in children(node):
            yield from visit(child, f"{path}.{key}" if path else key, key, node)
        active.discard(id(node))

    return visit(module, "", "", None)


def shape_of(layer: Any) -> tuple[int, ...] | None:
    """`[..., K, N]` of a layer's folded kernel; None where no adapter fits beside it."""
    if isinstance(layer, nnx.LoRALinear):  # has one of Flax's
        return None
    if isinstance(layer, nn.Linear | nn.ExpertLinear | general.Quantized | nnx.Linear):
        return tuple(value(layer.kernel).shape)
    found = general.fold_of(layer)
    return None if isinstance(found, str) else found[0].shape(tuple(layer.kernel.shape))


def _widths(root: Any, owner: Any, path: str, name: str, n: int) -> tuple[tuple[str, int], ...]:
    """Names and widths of the parts of a layer of n columns: of all but fused ones one, `whole`."""
    fused = getattr(owner, "fused_parts", dict)()
    if name in fused:
        parts: tuple[int, ...] = fused[name][0]
    elif isinstance(owner, nn.Experts) and name == "gate_up_proj":
        parts = (n // 2,) * 2
    else:
        return ((WHOLE, n),)
    names = _NAMES.get(name, ())
    if len(names) != len(parts) or _is_one_elsewhere(root, path):
        return ((WHOLE, n),)
    return tuple(zip(names, parts, strict=True))


def _is_one_elsewhere(root: Any, path: str) -> bool:
    """Whether a fused layer is one in the models that a family publishes too, as in Phi-3."""
    family = models.FAMILIES.get(getattr(getattr(root, "config", None), "model_type", ""))
    if not isinstance(root, models.Decoder) or family is None:
        return False
    rest = path.split(".", 2)[-1]
    target = f"layers.{{i}}.{rest}.kernel"
    rules = [rule for rule in family.tensor_names if rule.target == target]
    return bool(rules) and len(rules[0].names) == 1


def chosen(
    root: Any, layers: Iterable[Layer], targets: str | Iterable[str] | None
) -> list[tuple[Layer, Part]]:
    """The parts that targets match; without targets all but those of a model's head.

    Raises:
      ValueError: a target that matches none.
      TypeError: targets that are no names.
    """
    every = [(layer, part) for layer in layers for part in layer.parts]
    if targets is None:
        head = root.lm_head if isinstance(root, models.Decoder) else None
        return [pair for pair in every if pair[0].module is not head]
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"targets: expected names of layers, found {target!r}.")
    met = {target: [pair for pair in every if _matches(target, *pair)] for target in targets}
    for target, pairs in met.items():
        if not pairs:
            known = sorted({part.path.rpartition(".")[2] for _, part in every})
            close = difflib.get_close_matches(target.rpartition(".")[2], known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"targets: {target!r} is no linear layer of this {type(root).__name__}, whose "
                f"layers are called {', '.join(known) or '(there are none)'}.{hint}"
            )
    wanted = {part.path for pairs in met.values() for _, part in pairs}
    return [pair for pair in every if pair[1].path in wanted]


def _matches(target: str, layer: Layer, part: Part) -> bool:
    """Whether it is a name in a path (of the layer or of its part), or a pattern of paths."""
    patterns = (target, f"*.{target}")
    paths = (part.path, *layer.paths)
    return any(path_pattern.reach(one, path) for one in patterns for path in paths)
