"""Caches and states in functions that `jax.export` serializes: their static parts as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.export

from fdq.cache.block_tensor import BlockTensor
from fdq.cache.cache_tensor import CacheTensor
from fdq.cache.kv_cache import KVCache, LayerCache, LayerScales
from fdq.decoding.sampling import Sampling
from fdq.decoding.state import DecodeState
from fdq.formats.exporting import register
from fdq.schemes.scheme import CacheSpec


def _tensor_to_json(static: tuple[CacheSpec | None, int | None]) -> dict[str, Any] | None:
    spec, window = static
    fields = None if spec is None else dataclasses.asdict(spec)
    return fields if window is None else {"spec": fields, "window": window}


def _tensor_from_json(fields: dict[str, Any] | None) -> tuple[CacheSpec | None, int | None]:
    window = None
    if fields is not None and "window" in fields:
        fields, window = fields["spec"], fields["window"]
    return None if fields is None else CacheSpec(**fields), window


def _blocks_to_json(static: tuple[CacheSpec, None, tuple[int, int]]) -> dict[str, Any]:
    spec, _, unit = static
    return {"spec": dataclasses.asdict(spec), "unit": list(unit)}


def _blocks_from_json(fields: dict[str, Any]) -> tuple[CacheSpec, None, tuple[int, int]]:
    rows, columns = fields["unit"]
    return CacheSpec(**fields["spec"]), None, (rows, columns)


def _as_it_is(count: int | None) -> int | None:
    return count


register(CacheTensor, _tensor_to_json, _tensor_from_json)
register(BlockTensor, _blocks_to_json, _blocks_from_json)
register(Sampling, _as_it_is, _as_it_is)
register(KVCache, list, tuple)
for _kind in (LayerScales, DecodeState):
    register(_kind, list, tuple)  # nothing is static
jax.export.register_namedtuple_serialization(LayerCache, serialized_name="fdq.LayerCache")
