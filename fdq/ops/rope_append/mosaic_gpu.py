"""`rope_append` of one token per sequence in one launch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fdq.cache.cache_tensor import CacheTensor, sample_scales
from fdq.ops import self_check
from fdq.ops.kernels import Kernel, cache_unsupported, kernel_arrays, kind_of, slower
from fdq.ops.placement import sharded
from fdq.ops.rope_append.xla import RopeAppendArguments, Xla
from fdq.ops.rows import Sums
from pallas_kernels.device import MOST_MMA_ROWS, default_device


class MosaicGpu(Kernel[RopeAppendArguments]):
    """`pallas_kernels.append`."""

    def unsupported(self, arguments: RopeAppendArguments) -> str | None:
        """Several tokens, partial rotations, caches that kernels do not write, sharded arrays."""
        a = arguments
        if a.qkv.shape[1] != 1:
            return f"the kernel takes one token per sequence, found {a.qkv.shape[1]}"
        if 2 * a.angles[0].shape[-1] != a.k.head_dim:
            return (
                f"the kernel rotates whole heads, found {a.angles[0].shape[-1]} pairs of channels"
            )
        if a.qkv.order is not None:
            return "the columns of queries, keys and values are dealt out to shards"
        return cache_unsupported(a.k, a.v) or sharded(a.qkv, a.k, a.v)

    def declined(self, arguments: RopeAppendArguments) -> str | None:
        """Batches whose products are no kernels either, the tuning table, the self-check."""
        a = arguments
        batch, _, width = a.qkv.shape
        if batch > MOST_MMA_ROWS:
            return (
                f"the kernels of a decode step take up to {MOST_MMA_ROWS} sequences, found {batch}"
            )
        name = jnp.dtype(a.qkv.dtype).name if a.k.spec is None else kind_of(a.k)
        reason = slower("append", name, batch, width)
        return reason or Appending.of(a).self_check().failure(default_device())

    def __call__(
        self, arguments: RopeAppendArguments
    ) -> tuple[jax.Array, CacheTensor, CacheTensor]:
        """The cache is the one that was given, written in place."""
        from pallas_kernels.append.cache_update import append

        a = arguments
        split, batch, _, width = a.qkv.parts.shape
        cos, sin = (angle[:, 0] for angle in a.angles)
        out = append(
            a.qkv.parts.reshape(split, batch, width),
            cos,
            sin,
            jnp.broadcast_to(a.start, (batch,)).astype(jnp.int32),
            kernel_arrays(a.k),
            kernel_arrays(a.v),
            heads=a.heads,
            interleaved=a.interleaved,
            bias=a.qkv.bias,
            q_norm=a.q_norm,
            k_norm=a.k_norm,
            epsilon=a.epsilon,
            dtype=a.qkv.dtype,
        )
        k, v = (
            old.replace(codes=new.codes, scale=new.scale, zero=new.zero)
            for old, new in ((a.k, out.k), (a.v, out.v))
        )
        return out.q[:, None], k, v


@dataclasses.dataclass(frozen=True)
class Appending:
    """What the kernel is compiled for."""

    spec: Any  # of the cache; None are floats
    dtype: str
    interleaved: bool = False
    bias: bool = False
    norms: bool = False

    @classmethod
    def of(cls, a: RopeAppendArguments) -> Appending:
        """Of the arguments of an op."""
        dtype, bias = jnp.dtype(a.qkv.dtype).name, a.qkv.bias is not None
        return cls(a.k.spec, dtype, a.interleaved, bias, a.q_norm is not None)

    def self_check(self) -> self_check.Check:
        """The self-check of the kernel for it."""
        kind = "dynamic" if self.spec is None or self.spec.dynamic else "static"
        cache = self.dtype if self.spec is None else self.spec.format
        detail = f"{cache}, {kind}, {self.dtype}{', interleaved' * self.interleaved}"
        detail += f"{', norms' * self.norms}{', bias' * self.bias}"
        # A code may differ by one where the rotation does by a bit: 1 in 7 at most, of int4.
        return self_check.Check("append", detail, functools.partial(_case, self), 0.2)


def _case(what: Appending) -> tuple[Any, Any]:
    """One sequence in the middle of the cache, one in its last slot."""
    heads, kv_heads, d, slots = 2, 1, 128, 64
    keys = jax.random.split(jax.random.key(3), 2)
    width = (heads + 2 * kv_heads) * d
    parts = jax.random.normal(keys[0], (2, 2, 1, width), jnp.float32)
    qkv = Sums(parts, jnp.full((width,), 0.5) if what.bias else None, jnp.dtype(what.dtype))
    angle = jax.random.uniform(keys[1], (2, 1, d // 2), jnp.float32)
    scales = sample_scales(what.spec, kv_heads, d)
    side = CacheTensor.empty(
        (2, kv_heads, slots, d), what.spec, dtype=jnp.dtype(what.dtype), **scales
    )
    norm = jnp.full((d,), 1.5) if what.norms else None
    arguments = RopeAppendArguments(
        qkv,
        (jnp.cos(angle), jnp.sin(angle)),
        side,
        side,
        jnp.asarray([5, 63], jnp.int32),
        what.interleaved,
        norm,
        norm,
    )
    return MosaicGpu()(arguments), Xla()(arguments)
