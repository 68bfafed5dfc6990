"""Quantized weights in functions that `jax.export` serializes: their static parts as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export

from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import QTensor
from fdq.schemes.fold import Fold
from fdq.schemes.scheme import WeightSpec


def register(
    kind: type,
    to_json: Callable[[Any], Any],
    from_json: Callable[[Any], Any],
    **options: Any,
) -> None:
    """Registers a kind of pytree whose static parts `to_json` makes plain, and `from_json` again.

    `options` are those of `jax.export.register_pytree_node_serialization`.
    """
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"fdq.{kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(to_json(static)).encode(),
        deserialize_auxdata=lambda stored: from_json(json.loads(bytes(stored))),
        **options,
    )


def spec_to_json(spec: WeightSpec) -> dict[str, Any]:
    """The fields of a spec; `WeightSpec(**fields)` is the inverse."""
    return dataclasses.asdict(spec)


def _qtensor_to_json(static: Any) -> list[Any]:
    names, spec, padding = static
    return [list(names), spec_to_json(spec), padding]


def _qtensor_from_json(stored: list[Any]) -> Any:
    names, spec, padding = stored
    return tuple(names), WeightSpec(**spec), padding


def _folded_to_json(static: Any) -> list[Any]:
    fold, sizes = static
    return [list(fold.order), fold.contracted, list(sizes)]


def _folded_from_json(stored: list[Any]) -> Any:
    order, contracted, sizes = stored
    return Fold(tuple(order), contracted), tuple(sizes)


register(QTensor, _qtensor_to_json, _qtensor_from_json)
register(
    FoldedWeight,
    _folded_to_json,
    _folded_from_json,
    from_children=lambda static, children: FoldedWeight(children[0], *static),
)
