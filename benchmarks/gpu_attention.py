"""Decode attention over each cache format, and writing new tokens to the cache.

The kernel alone is cut as the tuning table says, like that which fdq runs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import fdq
from benchmarks import gpu_cases
from benchmarks.gpu_caches import random_caches
from benchmarks.gpu_cases import KERNEL, AttentionCase
from benchmarks.gpu_child import Emit, Settings, run_cases, section_main
from benchmarks.gpu_products import timed, tuned
from benchmarks.gpu_timing import Work, difference, l2_ratio
from benchmarks.gpu_weights import nbytes, random_array
from fdq.cache import LayerCache, parse_format
from fdq.ops.kernels import kernel_arrays


def run(settings: Settings, emit: Emit) -> None:
    """Measures all attention cases, or all appends (``more["append"]``).

    With ``more["proof"]`` those of `gpu_cases.proof_attention`, by the kernel alone.
    """
    if settings.more.get("append"):
        from benchmarks.gpu_append import append_cases, measure_append

        appends = append_cases()
        if settings.smoke:
            appends = [dataclasses.replace(case, case=small(case.case)) for case in appends[1:2]]
        run_cases(appends, settings, emit, measure_append)
        return
    proof = settings.more.get("proof")
    cases = gpu_cases.proof_attention() if proof else gpu_cases.attention_cases()
    settings = dataclasses.replace(settings, case_seconds=200.0)  # of which XLA compiles most
    if settings.smoke:
        cases = [small(next(case for case in cases if case.format == "C8"))]
    run_cases(cases, settings, emit, measure)


def small(case: AttentionCase) -> AttentionCase:
    """The case over 64 tokens with two heads a KV head."""
    return dataclasses.replace(case, batch=1, slots=64, heads=4, kv_heads=2)


def measure(case: AttentionCase, settings: Settings) -> dict[str, Any]:
    """Times one step of attention by kernel, XLA and cuDNN; bytes are those of the cache."""
    from pallas_kernels.attention.decode_attention import (
        decode_attention,
        decode_attention_reference,
    )

    dtype = jnp.dtype(settings.dtype)
    spec = parse_format(case.format)
    caches = random_caches(case, dtype, settings.l2_bytes, smoke=settings.smoke)
    q = random_array(jax.random.key(1), (case.batch, case.heads, case.head_dim), dtype)
    lengths = jnp.full((case.batch,), case.slots, jnp.int32)
    name = None if spec is None else spec.format
    first = caches[0]
    weights = case.batch * case.kv_heads * case.slots * case.head_dim  # as fdq looks it up
    config = tuned("decode_attention", name or dtype.name, rows=case.batch, weights=weights)

    def kernel(x: Any, cache: LayerCache) -> jax.Array:
        q, lengths = x
        return decode_attention(q, *map(kernel_arrays, cache), lengths=lengths, **config)

    def seam(x: Any, cache: LayerCache, implementation: str) -> jax.Array:
        q, lengths = x
        return fdq.attention(q[:, None], *cache, lengths=lengths, implementation=implementation)[
            :, 0
        ]

    x = (q, lengths)
    works: dict[str, Work | str] = {
        KERNEL: Work(kernel, x, caches),
        "fdq": Work(functools.partial(seam, implementation="mosaic_gpu"), x, caches),
        "xla": Work(functools.partial(seam, implementation="xla"), x, caches),
    }
    if settings.more.get("proof"):
        works = {KERNEL: works[KERNEL]}
    elif spec is None:
        works["cuDNN"] = _cudnn(x, caches)
    expected = jax.jit(
        lambda q, lengths, cache: decode_attention_reference(
            q.astype(jnp.float32), *map(kernel_arrays, cache), lengths=lengths
        )
    )(q, lengths, first)
    checks = dict.fromkeys(works, lambda y: difference(y, expected))
    entries = timed(works, checks, {}, settings)
    entries[KERNEL]["config"] = config
    size = nbytes(first)
    return {
        "section": "attention",
        "scheme": case.format,
        "model": case.model,
        "m": case.batch,
        "slots": case.slots,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "bytes": size,
        "l2_ratio": l2_ratio(len(caches) * size, settings.l2_bytes),
        "entries": entries,
    }


def _cudnn(x: Any, caches: list[LayerCache]) -> Work:
    """`jax.nn.dot_product_attention` by cuDNN, over caches in the order that it wants."""

    def step(x: Any, kv: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, lengths = x
        return jax.nn.dot_product_attention(
            q[:, None],
            *kv,
            key_value_seq_lengths=lengths,
            query_seq_lengths=jnp.ones_like(lengths),
            implementation="cudnn",
        )[:, 0]

    swap = jax.jit(lambda a: jnp.swapaxes(a, 1, 2))
    return Work(step, x, [(swap(c.k.codes), swap(c.v.codes)) for c in caches])


if __name__ == "__main__":
    section_main(run)
