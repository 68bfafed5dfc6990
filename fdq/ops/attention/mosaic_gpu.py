"""Attention of one query per sequence by a Mosaic GPU kernel."""

from __future__ import annotations

import functools
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
        a, size = arguments, _size(arguments)
        if reason := slower("decode_attention", *size):
            return reason
        settings = tuned("decode_attention", *size).config
        group = a.q.shape[2] // a.k.shape[1]
        check = self_check_of(_keys(a), group, a.q.dtype, settings)
        return check.failure(default_device())

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


def self_check_of(
    k: CacheTensor, group: int, dtype: Any, settings: dict[str, int]
) -> self_check.Check:
    """The self-check of the kernel for such a cache, `group` query heads a KV head, q in `dtype`.

    `settings` are those of the tuning table.
    """
    kind, d, dtype = kind_of(k), k.head_dim, jnp.dtype(dtype).name
    if k.spec is not None:
        scales = "dynamic" if k.spec.dynamic else "static"
        kind += f", {scales} scales per {k.spec.granularity}"
    detail = f"{kind}, {group} heads of {d}, {dtype}"
    detail += "".join(f", {name} {value}" for name, value in settings.items())
    chosen = tuple(settings.items())
    case = functools.partial(_case, k.spec, k.codes.dtype.name, group, d, dtype, chosen)
    # Results are rounded to the dtype of q, probabilities on tensor cores too.
    return self_check.Check("decode_attention", detail, case, 0.02)


def _case(
    spec: Any, cache_dtype: str, group: int, d: int, dtype: str, settings: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Three parts a sequence, then as many as the device takes; lengths around a block's end."""
    from pallas_kernels.attention.decode_attention import decode_attention

    kv_heads, slots = 2, 768
    lengths = jnp.asarray([slots, 257, 128], jnp.int32)
    keys = jax.random.split(jax.random.key(2), 3)
    query = jax.random.normal(keys[0], (3, 1, kv_heads * group, d)).astype(dtype)
    sides = [jax.random.normal(key, (3, kv_heads, slots, d)) for key in keys[1:]]
    if spec is None:
        sides = [side.astype(cache_dtype) for side in sides]
    scales = sample_scales(spec, kv_heads, d)
    k, v = (quantize_cache(side, spec, **scales) for side in sides)
    arrays = query[:, 0], kernel_arrays(k), kernel_arrays(v)
    ways: list[Any] = [{"parts": 3}, dict(settings)]
    found = [decode_attention(*arrays, lengths=lengths, **way)[:, None] for way in ways]
    return found, [attention_reference(query, k, v, lengths=lengths)] * len(found)


def _keys(arguments: AttentionArguments) -> CacheTensor:
    assert isinstance(arguments.k, CacheTensor)  # joined ones are not supported
    return arguments.k


def _size(arguments: AttentionArguments) -> tuple[str, int, int]:
    """What the tuning table looks a cache up by; numbers count, whatever their codes pack."""
    b, kv_heads, slots, head_dim = arguments.k.shape
    return kind_of(_keys(arguments)), arguments.q.shape[0], b * kv_heads * slots * head_dim
