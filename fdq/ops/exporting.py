"""Prepared weights in functions that `jax.export` serializes: their static parts as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from fdq.formats.exporting import register, spec_to_json
from fdq.ops.prepared_weight import PREPARED, Transposed
from fdq.schemes.scheme import WeightSpec
from pallas_kernels.weights.kernel_arrays import KernelWeight


def _prepared_to_json(static: tuple[WeightSpec, int]) -> list[Any]:
    spec, padding = static
    return [spec_to_json(spec), padding]


def _prepared_from_json(stored: list[Any]) -> tuple[WeightSpec, int]:
    spec, padding = stored
    return WeightSpec(**spec), padding


def _layout_to_json(static: tuple[Any]) -> dict[str, Any]:
    return dataclasses.asdict(static[0])


def _layout_from_json(fields: dict[str, Any]) -> tuple[Any]:
    from pallas_kernels.weights.layout import WeightLayout  # imports Mosaic

    block = fields.pop("block_size")
    return (WeightLayout(**fields, block_size=None if block is None else tuple(block)),)


for _kind in PREPARED:
    register(_kind, _prepared_to_json, _prepared_from_json)
register(KernelWeight, _layout_to_json, _layout_from_json)
register(Transposed, list, tuple)
