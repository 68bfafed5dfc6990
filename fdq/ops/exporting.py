"""Prepared weights in functions that `jax.export` serializes: their static parts as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.export

from fdq.formats.exporting import spec_to_json
from fdq.ops.prepared_weight import PREPARED, Transposed
from fdq.schemes.scheme import WeightSpec
from pallas_kernels.weights.kernel_arrays import KernelWeight


def _prepared_to_bytes(static: tuple[WeightSpec, int]) -> bytes:
    spec, padding = static
    return json.dumps([spec_to_json(spec), padding]).encode()


def _prepared_from_bytes(stored: bytes | bytearray) -> tuple[WeightSpec, int]:
    spec, padding = json.loads(bytes(stored))
    return WeightSpec(**spec), padding


def _layout_to_bytes(static: tuple[Any]) -> bytes:
    return json.dumps(dataclasses.asdict(static[0])).encode()


def _layout_from_bytes(stored: bytes | bytearray) -> tuple[Any]:
    from pallas_kernels.weights.layout import WeightLayout  # imports Mosaic

    fields = json.loads(bytes(stored))
    block = fields["block_size"]
    return (WeightLayout(**fields | {"block_size": None if block is None else tuple(block)}),)


for _kind in PREPARED:
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"fdq.{_kind.__name__}",
        serialize_auxdata=_prepared_to_bytes,
        deserialize_auxdata=_prepared_from_bytes,
    )
jax.export.register_pytree_node_serialization(
    KernelWeight,
    serialized_name="fdq.KernelWeight",
    serialize_auxdata=_layout_to_bytes,
    deserialize_auxdata=_layout_from_bytes,
)
jax.export.register_pytree_node_serialization(
    Transposed,
    serialized_name="fdq.Transposed",
    serialize_auxdata=lambda static: b"",
    deserialize_auxdata=lambda stored: (),
)
