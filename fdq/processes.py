"""Arrays on devices of several processes (`jax.distributed`), which all run the same program.

Each process has its own devices' parts of an array; JAX refuses to move values across without
being told that all processes take part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding


def onto(array: Any, sharding: NamedSharding) -> Any:
    """`jax.device_put`, also onto devices of other processes.

    A host or local array must be the same in all of them; each puts the parts of its devices.
    """
    if isinstance(array, Tracer) or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        return _moved(sharding)(array)
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = onto(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def on_host(tree: Any) -> Any:
    """`jax.device_get`, also of arrays whose parts other processes have: all call it together."""
    return jax.tree.map(whole, tree)


def whole(array: Any) -> Any:
    """`on_host` of one array."""
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        return array
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


@functools.lru_cache(maxsize=256)
def _moved(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=sharding)
