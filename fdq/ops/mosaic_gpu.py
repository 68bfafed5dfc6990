"""The seam between ops and ``pallas_kernels``: can a kernel do it, is it wanted, is it right here.

A kernel is traced where the user asks for it (``implementation``, ``FDQ_IMPLEMENTATION``), and on
GPUs wherever it can run, the tuning table prefers it, and it has proven itself on the device
(`fdq.ops.self_check`). Kernels are imported when the first is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fdq.ops import self_check
from fdq.ops.choice import Request, accept_kernel
from fdq.ops.kernel_layout import MOSAIC_GPU, kernel_weight, layout_obstacle
from fdq.qtensor import QTensor, materialize
from fdq.quantizers.weight import quantize_array
from fdq.scheme import ActivationSpec, CacheSpec
from pallas_kernels import choices
from pallas_kernels.launch import default_device

MOST_ROWS = 8
"""Rows of x that the matrix-vector kernels take."""

INTEGER_FORMATS = ("int8", "int4", "int3", "int2")


def use_matrix_vector(op: str, request: Request, rows: int, q: QTensor) -> bool:
    """Whether a product of ``rows`` rows with ``q [..., K, N]`` is traced as a kernel."""
    kernel = "gathered_matrix_vector" if q.ndim == 3 else "matrix_vector"

    def preference() -> str | None:
        if q.layout != MOSAIC_GPU:
            return "the weight is not in the kernels' layout (fdq.prepare puts it there)"
        shape = q.shape
        reason = _preference(kernel, q.spec.format, rows, shape[-2] * shape[-1])
        return reason or _check_product(q, default_device())

    return accept_kernel(op, request, _obstacle(rows, q), preference)


def _obstacle(rows: int, q: QTensor) -> str | None:
    if not 1 <= rows <= MOST_ROWS:
        return f"the kernels take 1 to {MOST_ROWS} rows of x, found {rows}"
    return layout_obstacle(q) or mesh_obstacle()


def mesh_obstacle() -> str | None:
    """Why kernels cannot run under the current mesh; None without one, and in shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(size == 1 for size in mesh.axis_sizes):
        return None
    if set(mesh.axis_names) <= set(mesh.manual_axes):
        return None
    return f"arrays may be sharded over the mesh {dict(mesh.shape)}"


def _preference(kernel: str, format: str, rows: int, weights: int) -> str | None:
    if jax.device_count() > 1:
        return "with several devices arrays may be sharded (FDQ_IMPLEMENTATION=mosaic_gpu insists)"
    choice = _choice(kernel, format, rows, weights)
    return None if choice.use == MOSAIC_GPU else choice.source


def _choice(kernel: str, format: str, rows: int, weights: int) -> choices.Choice:
    device = default_device()
    return choices.choose(device.device_kind, kernel, format, rows=rows, weights=weights)


def partial_sums(x: Any, q: QTensor) -> jax.Array:
    """Rows ``[M, K]`` (or what a kernel stages as such) times a weight -> ``[split, M, N]``."""
    from pallas_kernels.matmul import matrix_vector

    return matrix_vector(x, kernel_weight(q), config=_matrix_config("matrix_vector", q, x.shape[0]))


def _matrix_config(kernel: str, q: QTensor, rows: int) -> Any:
    """How the tuning table cuts a product, on top of the kernel's own choice."""
    from pallas_kernels.matmul import choose_config, multiprocessors

    shape = q.shape
    settings = _choice(kernel, q.spec.format, rows, shape[-2] * shape[-1]).config
    config = choose_config(kernel_weight(q).layout, rows, multiprocessors())
    return dataclasses.replace(config, **settings)


def product(x: jax.Array, q: QTensor) -> jax.Array:
    """Rows ``[M, K]`` times a weight -> float32 ``[M, N]``."""
    return jnp.sum(partial_sums(x, q), axis=0)


def integer_product(codes: jax.Array, q: QTensor) -> jax.Array:
    """int8 rows ``[M, K]`` times integer codes -> float32 ``[M, N]`` before the x scale."""
    from pallas_kernels.integer_matmul import integer_matrix_vector

    return jnp.sum(integer_matrix_vector(codes, kernel_weight(q)), axis=0)


def takes_integers(q: QTensor, spec: ActivationSpec) -> bool:
    """Whether a product with activations of ``spec`` is formed in integers."""
    return spec.format == "int8" and q.spec.format in INTEGER_FORMATS


@functools.cache
def _sample(format_key: Any) -> QTensor:
    """A small weight of a spec: 512 x 256, seeded."""
    values = jax.random.normal(jax.random.key(0), (512, 256), jnp.float32)
    return quantize_array(values, format_key, method=None)


def _check_product(q: QTensor, device: Any) -> str | None:
    spec = q.spec

    def case():
        from pallas_kernels.matmul import matrix_vector_reference

        weight = kernel_weight(_sample(spec))
        x = jax.random.normal(jax.random.key(1), (2, 512), jnp.float32)
        x = x.astype(jnp.float16 if _is_old(device) else jnp.bfloat16)
        return product(x, _sample(spec)), matrix_vector_reference(x, weight)[0]

    detail = f"{spec.format}, {spec.granularity}, {spec.group_size}, {spec.zero_point}"
    return self_check.failure("matrix_vector", detail, device, case)


def _is_old(device: Any) -> bool:
    try:
        return float(device.compute_capability) < 8
    except (AttributeError, ValueError):
        return False


def use_attention(request: Request, q: jax.Array, k: jax.Array, spec: CacheSpec | None) -> bool:
    """Whether attention of one query per sequence is traced as a kernel."""
    name = spec.format if spec is not None else k.dtype.name

    def preference() -> str | None:
        reason = _preference("decode_attention", name, q.shape[0], k.size)
        return reason or _check_attention(q, k, spec)

    obstacle = None
    if q.shape[1] != 1:
        obstacle = f"the kernel takes one query per sequence, found {q.shape[1]}"
    elif q.shape[-1] not in (64, 128, 256):
        obstacle = f"the kernel takes head_dim 64, 128 or 256, found {q.shape[-1]}"
    return accept_kernel("attention", request, obstacle or mesh_obstacle(), preference)


def _check_attention(q: jax.Array, k: jax.Array, spec: CacheSpec | None) -> str | None:
    heads, kv_heads, d = q.shape[2], k.shape[1], q.shape[3]
    group, dtype, device = heads // kv_heads, q.dtype, default_device()

    def case():
        from fdq.ops.attention import attention, attention_reference
        from fdq.ops.cache import quantize_cache

        keys = jax.random.split(jax.random.key(2), 3)
        query = jax.random.normal(keys[0], (2, 1, group, d)).astype(dtype)
        cache, arrays = [], {}
        for name, key in zip("kv", keys[1:], strict=True):
            values = jax.random.normal(key, (2, 1, 300, d))
            if spec is None:
                cache.append(values.astype(k.dtype))
                continue
            scale = zero = None
            if not spec.dynamic:
                wide = d if spec.granularity == "channel" else 1
                scale = jnp.full((1, wide), 0.03, jnp.float32)
                zero = jnp.full((1, wide), 7, jnp.uint8) if spec.zero_point else None
            codes, found, zeros = quantize_cache(values, spec, scale=scale, zero=zero)
            if codes.dtype == jnp.float8_e4m3fn:
                codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
            cache.append(codes)
            arrays[f"{name}_scale"] = found if scale is None else scale
            arrays[f"{name}_zero"] = zeros if zero is None else zero
        settings = {"lengths": jnp.asarray([300, 77], jnp.int32), "cache_format": spec, **arrays}
        result = attention(query, *cache, implementation=MOSAIC_GPU, **settings)
        return result, attention_reference(query, *cache, **settings)

    detail = f"{k.dtype.name if spec is None else spec.format}, {group} heads of {d}"
    # Results are rounded to the dtype of q, probabilities on tensor cores too.
    return self_check.failure("decode_attention", detail, device, case, tolerance=0.02)


def decode_attention(q, k, v, *, lengths, cache_format: CacheSpec | None, **arrays) -> jax.Array:
    """``fdq.ops.attention`` of one query per sequence, ``q [B, 1, H, D]``, by the kernel."""
    from pallas_kernels.decode_attention import decode_attention as kernel

    name = None if cache_format is None else cache_format.format
    return kernel(q[:, 0], k, v, lengths=lengths, cache_format=name, **arrays)[:, None]


def prepared(q: Any) -> bool:
    """Whether a parameter is a QTensor in the kernels' layout."""
    return isinstance(q, QTensor) and materialize(q).layout == MOSAIC_GPU
