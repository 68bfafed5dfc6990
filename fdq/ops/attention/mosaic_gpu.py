"""Attention of one query per sequence by a Mosaic GPU kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fdq.cache.cache_tensor import CacheTensor, quantize_cache, sample_scales
from fdq.ops import self_check
from fdq.ops.attention.joined import JoinedKeys
from fdq.ops.attention.xla import AttentionArguments, attention_reference
from fdq.ops.kernels import Kernel, cache_unsupported, kernel_arrays, kind_of, slower, tuned
from fdq.ops.placement import sharded
from pallas_kernels.device import default_device


class MosaicGpu(Kernel[AttentionArguments]):
    """`pallas_kernels.attention`."""

    def unsupported(self, arguments: AttentionArguments) -> str | None:
        """One query, plain scores, caches that the kernels read, nothing sharded."""
        a = arguments
        if a.sinks is not None:
            return "no kernel has attention sinks"
        if a.softcap is not None:
            return "no kernel caps scores"
        if a.q.shape[1] != 1:
            return f"the kernel takes one query per sequence, found {a.q.shape[1]}"
        if isinstance(a.k, JoinedKeys) or a.k.head_dim != a.v.head_dim:
            return "the kernel takes keys in one tensor, and values as wide as they are"
        if a.is_ring:
            return "the kernel reads no ring (a cache of fewer slots than positions)"
        return cache_unsupported(a.k, a.v) or sharded(a.q, a.k, a.v)

    def declined(self, arguments: AttentionArguments) -> str | None:
        """The tuning table's word, and the self-check's."""
        reason = slower("decode_attention", *_size(arguments))
        return reason or self.failure(arguments.q, _keys(arguments))

    def __call__(self, arguments: AttentionArguments) -> jax.Array:
        """One launch, or two where a sequence is shared by several programs."""
        from pallas_kernels.attention.decode_attention import decode_attention

        a = arguments
        settings: Any = tuned("decode_attention", *_size(a)).config
        q, k, v = a.q[:, 0], kernel_arrays(_keys(a)), kernel_arrays(a.v)
        lengths = jnp.minimum(a.lengths, a.offset + 1)
        out = decode_attention(
            q, k, v, lengths=lengths, sliding_window=a.sliding_window, scale=a.scale, **settings
        )
        return out[:, None]

    def failure(self, q: jax.Array, k: CacheTensor) -> str | None:
        """Why the kernel is switched off for such a cache on this device; None if it is right."""
        group, d, dtype, spec = q.shape[2] // k.shape[1], q.shape[3], q.dtype, k.spec
        cache_dtype, kind = k.codes.dtype, kind_of(k)

        def case() -> tuple[jax.Array, jax.Array]:
            keys = jax.random.split(jax.random.key(2), 3)
            query = jax.random.normal(keys[0], (2, 1, group, d)).astype(dtype)
            sides = [jax.random.normal(key, (2, 1, 300, d)) for key in keys[1:]]
            if spec is None:
                sides = [side.astype(cache_dtype) for side in sides]
            scales = sample_scales(spec, 1, d)
            keys, values = (quantize_cache(side, spec, **scales) for side in sides)
            lengths = jnp.asarray([300, 77], jnp.int32)
            arguments = AttentionArguments(query, keys, values, lengths, lengths - 1, None, d**-0.5)
            return self(arguments), attention_reference(query, keys, values, lengths=lengths)

        if spec is not None:
            kind += f", {'dynamic' if spec.dynamic else 'static'} scales per {spec.granularity}"
        detail = f"{kind}, {group} heads of {d}, {dtype.name}"
        # Results are rounded to the dtype of q, probabilities on tensor cores too.
        device = default_device()
        return self_check.failure("decode_attention", detail, device, case, tolerance=0.02)


def _keys(arguments: AttentionArguments) -> CacheTensor:
    assert isinstance(arguments.k, CacheTensor)  # joined ones are not supported
    return arguments.k


def _size(arguments: AttentionArguments) -> tuple[str, int, int]:
    """What the tuning table looks a cache up by; numbers count, whatever their codes pack."""
    b, kv_heads, slots, head_dim = arguments.k.shape
    return kind_of(_keys(arguments)), arguments.q.shape[0], b * kv_heads * slots * head_dim
