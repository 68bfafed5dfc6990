"""How a cache lies on a mesh: its scales are cut as the keys and values that they go with."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from fdq.cache.cache_tensor import CacheTensor


def parts(sharding: NamedSharding | None, heads: int) -> int:
    """Into how many parts of their own keys and values are cut; a single head is not.

    Raises:
      ValueError: what is no NamedSharding of four axes at most.
    """
    if sharding is None:
        return 1
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) > 4:
        raise ValueError(
            f"KV cache sharding: expected a NamedSharding of [batch, kv_heads, slots, head_dim], "
            f"found {sharding}."
        )
    entries = [entry for i, entry in enumerate(sharding.spec) if i != 1 or heads > 1]
    names = [name for entry in entries for name in _names(entry)]
    return math.prod(sharding.mesh.shape[name] for name in names)


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def of_batch(sharding: NamedSharding) -> NamedSharding:
    """The sharding of `[batch]`, where keys and values have this one."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))


def of_tensor(tensor: CacheTensor, sharding: NamedSharding) -> CacheTensor:
    """A CacheTensor of shardings; an abstract one says which arrays there are."""
    batch, by_head, slots, channels = (*sharding.spec, *[None] * (4 - len(sharding.spec)))
    heads = by_head if tensor.shape[1] > 1 else None

    def of(*entries: Any) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*entries))

    def small(array: Any) -> NamedSharding | None:
        if array is None:
            return None
        if tensor.dynamic:
            return of(batch, heads, slots)
        return of(heads, channels if array.shape[-1] > 1 else None)

    return tensor.replace(
        codes=of(batch, heads, slots, channels),
        scale=small(tensor.scale),
        zero=small(tensor.zero),
    )
