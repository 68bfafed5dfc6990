"""Writing one new token of one layer to the cache: rotation, quantization and the write."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_caches import random_caches
from benchmarks.gpu_cases import KERNEL, MODELS, AttentionCase
from benchmarks.gpu_child import Settings
from benchmarks.gpu_products import timed
from benchmarks.gpu_timing import Work, difference, l2_ratio
from benchmarks.gpu_weights import random_array
from fdq.cache import LayerCache
from fdq.models import CONFIGS
from fdq.nn.rotary import rotary_angles
from fdq.ops.kernels import kernel_arrays
from fdq.ops.rope_append.xla import apply_rotary, write_slots


@dataclasses.dataclass(frozen=True)
class AppendCase:
    """One new token of each sequence of a cache.

    Attributes:
      case: the cache and the heads.
    """

    case: AttentionCase

    @property
    def key(self) -> str:
        """Unique."""
        return f"append {self.case.key}"


def append_cases() -> list[AppendCase]:
    """Each cache format for one sequence of Llama's and ERNIE's heads, and a batch."""
    cases = []
    for model, batch in ((MODELS[0], 1), (MODELS[2], 1), (MODELS[0], 64)):
        config = CONFIGS[model]
        for format in ("C16", "C8", "Cfp8", "C4"):
            case = AttentionCase(
                format=format,
                model=model,
                batch=batch,
                slots=4096 if batch == 1 else 512,
                heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            )
            cases.append(AppendCase(case))
    return cases


def _written(cache: LayerCache, slots: jax.Array) -> list[jax.Array]:
    """The codes of the new tokens, keys and values: ``[B, KH, D]`` each."""
    index = slots[:, None, None, None]
    return [jnp.take_along_axis(a.codes, index, axis=2)[:, :, 0] for a in cache]


def _mismatch(found: jax.Array, expected: jax.Array) -> float:
    """Of floats the difference; of codes a fifth of the part of them that differ.

    A rotation that rounds differently may move a code by one, now and then.
    """
    if jnp.issubdtype(found.dtype, jnp.floating):
        return difference(found, expected)
    return float(jnp.mean(found != expected)) / 5


def measure_append(append: AppendCase, settings: Settings) -> dict[str, Any]:
    """Times the launch that writes a token, and XLA's operations for the same.

    Bytes are those of the queries, keys and values that are read and written: little, so that
    what counts is the time.
    """
    from pallas_kernels.append.cache_update import append as kernel

    case = append.case
    dtype = jnp.dtype(settings.dtype)
    config = CONFIGS[case.model]
    heads, d, interleaved = case.heads, case.head_dim, config.rotary.interleaved
    caches = random_caches(case, dtype, settings.l2_bytes, smoke=settings.smoke)
    width = (heads + 2 * case.kv_heads) * d
    qkv = random_array(jax.random.key(1), (case.batch, width), dtype)
    slots = jnp.arange(case.batch, dtype=jnp.int32) % case.slots
    cos, sin = rotary_angles(slots[:, None], config.rotary, d)
    x = (qkv, cos, sin, slots)

    def by_kernel(x: Any, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        qkv, cos, sin, slots = x
        angles = cos[:, 0], sin[:, 0]
        more = {"heads": heads, "interleaved": interleaved}
        done = kernel(qkv, *angles, slots, *map(kernel_arrays, cache), **more)
        written = (
            old.replace(codes=new.codes, scale=new.scale, zero=new.zero)
            for old, new in zip(cache, done[1:], strict=True)
        )
        return done.q, LayerCache(*written)

    def by_xla(x: Any, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        qkv, cos, sin, slots = x
        rows = qkv.reshape(case.batch, 1, -1, d)
        q, k, v = jnp.split(rows, (heads, heads + case.kv_heads), axis=2)
        q = apply_rotary(q, (cos, sin), interleaved=interleaved)
        k = apply_rotary(k, (cos, sin), interleaved=interleaved)
        written = (write_slots(a, x, slots) for a, x in zip(cache, (k, v), strict=True))
        return q[:, 0], LayerCache(*written)

    works: dict[str, Work | str] = {
        KERNEL: Work(by_kernel, x, caches, threads=True),
        "xla": Work(by_xla, x, caches, threads=True),
    }
    expected = jax.jit(by_xla)(x, caches[0])

    def check(found: tuple[jax.Array, LayerCache]) -> float:
        pairs = zip(_written(found[1], slots), _written(expected[1], slots), strict=True)
        return max(difference(found[0], expected[0]), *(_mismatch(a, b) for a, b in pairs))

    checks = dict.fromkeys(works, check)
    return {
        "section": "append",
        "scheme": case.format,
        "model": case.model,
        "m": case.batch,
        "heads": heads,
        "kv_heads": case.kv_heads,
        "head_dim": d,
        "slots": case.slots,
        "bytes": 2 * qkv.nbytes,
        "l2_ratio": l2_ratio(2 * qkv.nbytes, settings.l2_bytes),
        "entries": timed(works, checks, {}, settings),
    }
