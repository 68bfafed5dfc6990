"""The seam between ops and ``pallas_kernels``: can a kernel do it, is it wanted, is it right here.

A kernel is traced where the user asks for it (``implementation``, ``FDQ_IMPLEMENTATION``), and on
GPUs wherever it can run, the tuning table prefers it, and it has proven itself on the device
(`fdq.ops.self_check`). Kernels are imported when the first is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats import FORMATS
from fdq.formats.qtensor import QTensor
from fdq.ops import self_check
from fdq.ops.choice import Request, accept_kernel
from fdq.ops.kernel_layout import MOSAIC_GPU, kernel_weight, layout_obstacle
from fdq.quantizers import quantize_array
from fdq.schemes.scheme import ActivationSpec, WeightSpec
from pallas_kernels.device import MOST_ROWS, default_device
from pallas_kernels.tuning import choices


def use_matrix_vector(
    op: str, request: Request, rows: int, q: Any, activation: ActivationSpec | None = None
) -> bool:
    """Whether a product of ``rows`` rows with ``q [..., K, N]`` is traced as a kernel.

    Args:
      op: for messages.
      request: what the user asked for.
      rows: M.
      q: a QTensor without Variables, or an array, which no kernel reads.
      activation: what rows are quantized to.
    """

    def preference() -> str | None:
        if q.layout != MOSAIC_GPU:
            return "the weight is not in the kernels' layout (fdq.prepare puts it there)"
        kernel = _product_kernel(q, activation)
        shape = q.shape
        reason = _preference(kernel, q.spec.format, rows, shape[-2] * shape[-1])
        return reason or _check_product(kernel, q, default_device())

    return accept_kernel(op, request, lambda: _obstacle(rows, q), preference)


def use_gathered(request: Request, rows: int, w: Any, activation: ActivationSpec | None) -> bool:
    """Whether products of ``rows`` rows with experts ``w [E, K, N]`` are traced as a kernel."""
    if activation is None:
        return use_matrix_vector("grouped_matmul", request, rows, w)

    def obstacle() -> str:
        return "no kernel gathers experts for quantized activations"

    return accept_kernel("grouped_matmul", request, obstacle, lambda: None)


def _product_kernel(q: QTensor, activation: ActivationSpec | None) -> str:
    """The name in the tuning table."""
    if q.ndim == 3:
        return "gathered_matrix_vector"
    if activation is not None and takes_integers(q, activation):
        from pallas_kernels.matmul.integer import has_kernel

        if has_kernel(kernel_weight(q)):
            return "integer_matrix_vector"
    return "matrix_vector"


def _obstacle(rows: int, q: Any) -> str | None:
    if not isinstance(q, QTensor):
        return "the weight is an array, and the kernels read quantized ones"
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
    from pallas_kernels.matmul.matrix_vector import matrix_vector

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
    from pallas_kernels.matmul.gathered import gathered_config, gathered_matrix_vector

    weights = q.shape[-2] * q.shape[-1]
    tuned = _choice("gathered_matrix_vector", q.spec.format, x.shape[0], weights).config
    config = gathered_config(kernel_weight(q).layout, index.shape[0])
    settings: dict[str, Any] = {"config": dataclasses.replace(config, **tuned)}
    if shared is not None:
        rows, weight = shared
        settings["shared"] = rows, kernel_weight(weight)
    return gathered_matrix_vector(x, kernel_weight(q), index, **settings)


def _matrix_config(kernel: str, q: QTensor, rows: int) -> Any:
    """How the tuning table cuts a product, on top of the kernel's own choice."""
    from pallas_kernels.matmul.matrix_vector import choose_config, multiprocessors

    shape = q.shape
    settings = _choice(kernel, q.spec.format, rows, shape[-2] * shape[-1]).config
    config = choose_config(kernel_weight(q).layout, rows, multiprocessors())
    return dataclasses.replace(config, **settings)


def product(x: Any, q: QTensor) -> jax.Array:
    """Rows ``[M, K]`` (or what a kernel stages as such) times a weight -> float32 ``[M, N]``."""
    return jnp.sum(partial_sums(x, q), axis=0)


def integer_product(codes: jax.Array, q: QTensor) -> jax.Array:
    """int8 rows ``[M, K]`` times integer codes -> float32 ``[M, N]`` before the x scale."""
    from pallas_kernels.matmul.integer import has_kernel, integer_matrix_vector

    weight = kernel_weight(q)
    if not has_kernel(weight):
        return product(codes.astype(jnp.float32), q)
    config = _matrix_config("integer_matrix_vector", q, codes.shape[0])
    return jnp.sum(integer_matrix_vector(codes, weight, config=config), axis=0)


def takes_integers(q: QTensor, spec: ActivationSpec) -> bool:
    """Whether a product with activations of ``spec`` is formed in integers."""
    per_row = spec.granularity != "token_group"
    integers = FORMATS[q.spec.format].integer_offset(q.spec) is not None
    return per_row and spec.format == "int8" and integers


@functools.cache
def _sample(spec: WeightSpec) -> QTensor:
    """A small weight: 256 columns, and whole groups of 512 rows or more; seeded."""
    rows = math.lcm(spec.group_size or 1, 128)
    values = jax.random.normal(jax.random.key(0), (rows * -(-512 // rows), 256), jnp.float32)
    return quantize_array(values, spec, method=None)


def _check_product(kernel: str, q: QTensor, device: Any) -> str | None:
    spec = q.spec

    def case():
        from pallas_kernels.matmul.gathered import gathered_matrix_vector_reference
        from pallas_kernels.matmul.integer import integer_matrix_vector_reference
        from pallas_kernels.matmul.matrix_vector import matrix_vector_reference
        from pallas_kernels.matmul.row_sources import Gated, Normed

        sample = _sample(spec)
        weight = kernel_weight(sample)
        k = sample.shape[0]
        keys = jax.random.split(jax.random.key(1), 3)
        dtype = jnp.float16 if _is_old(device) else jnp.bfloat16
        x = jax.random.normal(keys[0], (2, k), jnp.float32).astype(dtype)
        if kernel == "integer_matrix_vector":
            codes = jax.random.randint(keys[0], (2, k), -127, 128).astype(jnp.int8)
            wanted = integer_matrix_vector_reference(codes, weight)[0]
            return integer_product(codes, sample), wanted
        if kernel == "matrix_vector":
            # In float32: rounded to 16 bits, two correct norms may differ by a bit.
            normed = Normed(x.astype(jnp.float32), 1 + jax.random.uniform(keys[1], (k,)), 1e-6)
            results = product(x, sample), product(normed, sample)
            return results, [matrix_vector_reference(rows, weight)[0] for rows in (x, normed)]
        stack = jax.tree.map(lambda a: jnp.stack([a, jnp.zeros_like(a), a]), sample)
        index = jnp.asarray([2, 0, 0, 2], jnp.int32)
        partials = jax.random.normal(keys[2], (2, 4, 2 * k), jnp.float32)
        picked, shared = Gated(partials, jnp.float32), Gated(partials[:, :2], jnp.float32)
        results = gathered_sums(picked, stack, index, (shared, sample))
        wanted = gathered_matrix_vector_reference(
            picked, kernel_weight(stack), index, (shared, weight)
        )
        return [a.sum(0) for a in results], [a[0] for a in wanted]

    scales = f"{spec.granularity} {spec.group_size or ''}".strip()
    detail = f"{spec.format}, {scales} scales of {spec.scale_dtype}, zero point {spec.zero_point}"
    return self_check.failure(kernel, detail, device, case)


def _is_old(device: Any) -> bool:
    try:
        return float(device.compute_capability) < 8
    except (AttributeError, ValueError):
        return False


def routing_preference(experts: int, top_k: int) -> str | None:
    """Why XLA is to route; None if the kernels are."""
    reason = _preference("router", "float32", 1, experts)
    if reason is not None:
        return reason

    def case():
        from pallas_kernels.router import routing

        keys = jax.random.split(jax.random.key(4), 2)
        x = jax.random.normal(keys[0], (2, 256), jnp.float32)
        kernel = jax.random.normal(keys[1], (256, experts), jnp.float32)
        logits = routing.router_logits(x, kernel)
        wanted = routing.router_logits_reference(x, kernel)
        chosen = routing.top_k_experts(logits, None, experts=experts, top_k=top_k)
        wanted_chosen = routing.top_k_experts_reference(wanted, None, experts=experts, top_k=top_k)
        return (logits.sum(0)[:, :experts], chosen), (wanted[0], wanted_chosen)

    return self_check.failure("router", f"{top_k} of {experts}", default_device(), case)
