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
from fdq.ops.choice import Request, accept_kernel, default_device
from fdq.ops.kernel_layout import MOSAIC_GPU, kernel_weight, layout_obstacle
from fdq.qtensor import QTensor, materialize
from fdq.quantizers.weight import quantize_array
from fdq.scheme import ActivationSpec, CacheSpec
from pallas_kernels import choices

MOST_ROWS = 8
"""Rows of x that the matrix-vector kernels take."""

HEAD_DIMS = (64, 128, 256)
"""Those that attention and append are laid out for."""

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

    return accept_kernel(op, request, lambda: _obstacle(rows, q), preference)


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


def gathered_sums(x: Any, q: QTensor, index: jax.Array, shared: tuple[Any, QTensor] | None) -> Any:
    """Partial sums of ``x[p // picks] @ q[index[p]]``, with those of ``shared`` in one launch.

    Args:
      x: rows ``[T, K]``, T a divisor of P.
      q: ``[E, K, N]``.
      index: int32 ``[P]``.
      shared: rows and a weight ``[K', N']`` that all of them are multiplied by.

    Returns:
      float32 ``[split, P, N]``; with ``shared`` a pair.
    """
    from pallas_kernels.grouped_matmul import gathered_matrix_vector

    settings = {}
    weights = q.shape[-2] * q.shape[-1]
    if _choice("gathered_matrix_vector", q.spec.format, x.shape[0], weights).config:
        settings["config"] = _matrix_config("gathered_matrix_vector", q, 1)
    if shared is not None:
        rows, weight = shared
        settings["shared"] = rows, kernel_weight(weight)
    return gathered_matrix_vector(x, kernel_weight(q), index, **settings)


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
    from pallas_kernels.integer_matmul import has_kernel, integer_matrix_vector

    weight = kernel_weight(q)
    if not has_kernel(weight):
        return product(codes.astype(jnp.float32), q)
    config = _matrix_config("integer_matrix_vector", q, codes.shape[0])
    return jnp.sum(integer_matrix_vector(codes, weight, config=config), axis=0)


def takes_integers(q: QTensor, spec: ActivationSpec) -> bool:
    """Whether a product with activations of ``spec`` is formed in integers."""
    return spec.format == "int8" and q.spec.format in INTEGER_FORMATS


@functools.cache
def _sample(format_key: Any) -> QTensor:
    """A small weight of a spec: 512 x 256, seeded."""
    values = jax.random.normal(jax.random.key(0), (512, 256), jnp.float32)
    return quantize_array(values, format_key, method=None)


def _check_product(q: QTensor, device: Any) -> str | None:
    spec, experts = q.spec, q.ndim == 3

    def case():
        from pallas_kernels.grouped_matmul import gathered_matrix_vector_reference
        from pallas_kernels.matmul import matrix_vector_reference

        sample = _sample(spec)
        x = jax.random.normal(jax.random.key(1), (2, 512), jnp.float32)
        x = x.astype(jnp.float16 if _is_old(device) else jnp.bfloat16)
        if not experts:
            return product(x, sample), matrix_vector_reference(x, kernel_weight(sample))[0]
        stack = jax.tree.map(lambda a: jnp.stack([a, jnp.zeros_like(a), a]), sample)
        index = jnp.asarray([2, 0, 0, 2], jnp.int32)
        wanted = gathered_matrix_vector_reference(x, kernel_weight(stack), index)
        return gathered_sums(x, stack, index, None).sum(0), wanted[0]

    kernel = "gathered_matrix_vector" if experts else "matrix_vector"
    detail = f"{spec.format}, {spec.granularity}, {spec.group_size}, {spec.zero_point}"
    return self_check.failure(kernel, detail, device, case)


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

    def obstacle() -> str | None:
        if q.shape[1] != 1:
            return f"the kernel takes one query per sequence, found {q.shape[1]}"
        return head_dim_obstacle(q.shape[-1]) or mesh_obstacle()

    return accept_kernel("attention", request, obstacle, preference)


def head_dim_obstacle(head_dim: int) -> str | None:
    """Why attention and append have no kernel for a head_dim; None if they have."""
    if head_dim in HEAD_DIMS:
        return None
    return f"the kernels take head_dim {', '.join(map(str, HEAD_DIMS))}, found {head_dim}"


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
    settings: Any = _choice("decode_attention", name or k.dtype.name, q.shape[0], k.size).config
    out = kernel(q[:, 0], k, v, lengths=lengths, cache_format=name, **arrays, **settings)
    return out[:, None]


def prepared(q: Any) -> bool:
    """Whether a parameter is a QTensor in the kernels' layout."""
    return isinstance(q, QTensor) and materialize(q).layout == MOSAIC_GPU


def append_preference(spec: CacheSpec | None, qkv: jax.Array, options: Any) -> str | None:
    """Why XLA is to append; None if the kernel is."""
    name = "float" if spec is None else spec.format
    reason = _preference("append", name, qkv.shape[1], qkv.shape[2])
    if reason is not None or (spec is not None and not spec.dynamic):
        return reason  # static scales differ in nothing that a check would see

    def case():
        from pallas_kernels.cache_update import append, append_reference

        heads, kv_heads, d, slots = 2, 1, 128, 64
        keys = jax.random.split(jax.random.key(3), 2)
        width = (heads + 2 * kv_heads) * d
        parts = jax.random.normal(keys[0], (2, 2, width), jnp.float32)
        angle = jax.random.uniform(keys[1], (2, d // 2), jnp.float32)
        dtype = jnp.float32 if spec is None else _CODES[spec.format]
        columns = d // 2 if spec is not None and spec.format == "int4" else d
        codes = jnp.zeros((2, kv_heads, slots, columns), dtype)
        scale = zero = None
        if spec is not None:
            scale = jnp.zeros((2, kv_heads, slots), jnp.float32)
            zero = jnp.zeros((2, kv_heads, slots), jnp.uint8) if spec.format == "int4" else None
        settings = {
            "heads": heads,
            "interleaved": options["interleaved"],
            "cache_format": None if spec is None else spec.format,
            "dtype": jnp.float32,
        }
        arrays = (parts, jnp.cos(angle), jnp.sin(angle), jnp.asarray([5, 63], jnp.int32))
        caches = (codes, codes, scale, scale, zero, zero)
        wanted = append_reference(*arrays, *caches, **settings)
        result = jax.jit(lambda *a: append(*a, **settings))(*arrays, *caches)
        return result, wanted

    # A code may differ by one where the rotation does by a bit: 1 in 7 at most, of int4.
    return self_check.failure("append", name, default_device(), case, tolerance=0.2)


_CODES = {"int8": jnp.int8, "float8_e4m3": jnp.uint8, "int4": jnp.uint8}


def routing_preference(experts: int, top_k: int) -> str | None:
    """Why XLA is to route; None if the kernels are."""
    reason = _preference("router", "float32", 1, experts)
    if reason is not None:
        return reason

    def case():
        from pallas_kernels import routing

        keys = jax.random.split(jax.random.key(4), 2)
        x = jax.random.normal(keys[0], (2, 256), jnp.float32)
        kernel = jax.random.normal(keys[1], (256, experts), jnp.float32)
        logits = routing.router_logits(x, kernel)
        wanted = routing.router_logits_reference(x, kernel)
        chosen = routing.top_k_experts(logits, None, experts=experts, top_k=top_k)
        wanted_chosen = routing.top_k_experts_reference(wanted, None, experts=experts, top_k=top_k)
        return (logits.sum(0)[:, :experts], chosen), (wanted[0], wanted_chosen)

    return self_check.failure("router", f"{top_k} of {experts}", default_device(), case)
