"""Quantized weights in functions that `jax.export` serializes: their static parts as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.export

from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import QTensor
from fdq.schemes.fold import Fold
from fdq.schemes.scheme import WeightSpec


def spec_to_json(spec: WeightSpec) -> dict[str, Any]:
    """The fields of a spec; `WeightSpec(**fields)` is the inverse."""
    return dataclasses.asdict(spec)


def _qtensor_to_bytes(aux_data: Any) -> bytes:
    names, spec, padding = aux_data
    return json.dumps([list(names), spec_to_json(spec), padding]).encode()


def _qtensor_from_bytes(stored: bytes | bytearray) -> Any:
    names, spec, padding = json.loads(bytes(stored))
    return tuple(names), WeightSpec(**spec), padding


def _folded_to_bytes(aux_data: Any) -> bytes:
    fold, sizes = aux_data
    return json.dumps([list(fold.order), fold.contracted, list(sizes)]).encode()


def _folded_from_bytes(stored: bytes | bytearray) -> Any:
    order, contracted, sizes = json.loads(bytes(stored))
    return Fold(tuple(order), contracted), tuple(sizes)


jax.export.register_pytree_node_serialization(
    QTensor,
    serialized_name="fdq.QTensor",
    serialize_auxdata=_qtensor_to_bytes,
    deserialize_auxdata=_qtensor_from_bytes,
)
jax.export.register_pytree_node_serialization(
    FoldedWeight,
    serialized_name="fdq.FoldedWeight",
    serialize_auxdata=_folded_to_bytes,
    deserialize_auxdata=_folded_from_bytes,
    from_children=lambda aux_data, children: FoldedWeight(children[0], *aux_data),
)
