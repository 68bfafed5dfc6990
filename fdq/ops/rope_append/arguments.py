"""The arguments of `rope_append`, as its implementations take them."""

from __future__ import annotations

import dataclasses

import jax

from fdq.cache.cache_tensor import CacheTensor
from fdq.ops.rows import Sums


@dataclasses.dataclass(frozen=True, eq=False)
class RopeAppendArguments:
    """See `fdq.ops.rope_append.api.rope_append`."""

    qkv: Sums
    angles: tuple[jax.Array, jax.Array]
    k: CacheTensor
    v: CacheTensor
    start: jax.Array
    interleaved: bool
    q_norm: jax.Array | None = None
    k_norm: jax.Array | None = None
    epsilon: float = 1e-6

    @property
    def kv_heads(self) -> int:
        """KH."""
        return self.k.shape[1]

    @property
    def heads(self) -> int:
        """H."""
        return self.qkv.shape[-1] // self.k.head_dim - 2 * self.kv_heads
