"""Caches and states in functions that `jax.export` serializes: their static parts as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.export

from fdq.cache.cache_tensor import CacheTensor
from fdq.cache.kv_cache import KVCache, LayerCache, LayerScales
from fdq.decoding.sampling import Sampling
from fdq.decoding.state import DecodeState
from fdq.schemes.scheme import CacheSpec


def _nothing(static: Any) -> bytes:
    return b""


def _no_fields(stored: bytes | bytearray) -> tuple[()]:
    return ()


def _spec_to_bytes(static: tuple[CacheSpec | None]) -> bytes:
    (spec,) = static
    return json.dumps(None if spec is None else dataclasses.asdict(spec)).encode()


def _spec_from_bytes(stored: bytes | bytearray) -> tuple[CacheSpec | None]:
    fields = json.loads(bytes(stored))
    return (None if fields is None else CacheSpec(**fields),)


jax.export.register_pytree_node_serialization(
    CacheTensor,
    serialized_name="fdq.CacheTensor",
    serialize_auxdata=_spec_to_bytes,
    deserialize_auxdata=_spec_from_bytes,
)


def _count_to_bytes(count: int | None) -> bytes:
    return json.dumps(count).encode()


def _count_from_bytes(stored: bytes | bytearray) -> int | None:
    return json.loads(bytes(stored))


jax.export.register_pytree_node_serialization(
    Sampling,
    serialized_name="fdq.Sampling",
    serialize_auxdata=_count_to_bytes,
    deserialize_auxdata=_count_from_bytes,
)
jax.export.register_namedtuple_serialization(LayerCache, serialized_name="fdq.LayerCache")
for _kind in (KVCache, LayerScales, DecodeState):
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"fdq.{_kind.__name__}",
        serialize_auxdata=_nothing,
        deserialize_auxdata=_no_fields,
    )
