"""The products of one decode step, joined so that nothing has to run between two kernels.

A product's partial sums are added up by whatever reads them: the residual addition, the kernel that
writes the cache, or the next product, which also normalizes or gates its rows as it stages them.
Each function here falls back to XLA by itself where a kernel cannot or should not run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats.qtensor import QTensor, materialize
from fdq.ops import mosaic_gpu
from fdq.ops.choice import accept_kernel, resolve_implementation, trace_target
from fdq.ops.matmul import matmul
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.device import MOST_ROWS

Rows = Any
"""``[M, K]``: an array, or ``Normed`` or ``Gated`` rows that kernels finish as they stage them."""


def joins_token_step(rows: int) -> bool:
    """Whether a decode step of ``rows`` sequences is put together from the functions here."""
    request = resolve_implementation("decode step", None)
    if request.name == "xla" or not 1 <= rows <= MOST_ROWS:
        return False
    if request.name is None and (trace_target().platform != "gpu" or jax.device_count() > 1):
        return False
    return mosaic_gpu.mesh_obstacle() is None


def normed(x: jax.Array, scale: jax.Array, epsilon: float) -> Rows:
    """Rows ``x [M, K]`` that are RMS-normalized where they are read."""
    from pallas_kernels.matmul.row_sources import Normed

    return Normed(x, scale, epsilon)


def gated(partials: jax.Array, dtype: Any) -> Rows:
    """``silu(gate) * up`` of partial sums ``[split, M, 2 I]`` of gate and up, where it is read."""
    from pallas_kernels.matmul.row_sources import Gated

    return Gated(partials, jnp.dtype(dtype))


def finished(x: Rows) -> jax.Array:
    """The rows as an array."""
    return x if isinstance(x, jax.Array) else x.value()


def partial_product(
    x: Rows,
    w: QTensor | jax.Array,
    *,
    activation: ActivationSpec | None = None,
    activation_scale: jax.Array | None = None,
) -> jax.Array:
    """``x @ w`` as float32 partial sums ``[split, M, N]``, to be added up by whoever reads them."""
    if isinstance(w, QTensor) and activation is None:
        w = materialize(w)
        request = resolve_implementation("matmul", None)
        if mosaic_gpu.use_matrix_vector("matmul", request, x.shape[0], w):
            return mosaic_gpu.partial_sums(x, w)
    y = matmul(
        finished(x),
        w,
        activation=activation,
        activation_scale=activation_scale,
        out_dtype=jnp.float32,
    )
    return y[None]


def added_up(partials: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """``[split, M, N]``, or ``[split, M, P, N]`` with weights ``[M, P]`` -> ``[M, N]``.

    Spelled out term by term: a reduction would be a launch of its own, while XLA joins additions to
    whatever reads them.
    """
    total = functools.reduce(jnp.add, [partials[i] for i in range(partials.shape[0])])
    if weights is None:
        return total
    terms = [total[:, p] * weights[:, p, None] for p in range(weights.shape[1])]
    return functools.reduce(jnp.add, terms)


def expert_products(
    x: Rows,
    index: jax.Array,
    gate_up: Any,
    down: Any,
    shared: tuple[Any, ...] | None = None,
) -> tuple[jax.Array, jax.Array | None] | None:
    """SwiGLU experts of a decode step in two launches, the shared ones along with the picked.

    Args:
      x: rows ``[M, K]``.
      index: int32 ``[M, top_k]``, the experts of each row.
      gate_up: ``[E, K, 2 I]``, gate first.
      down: ``[E, I, K]``.
      shared: gate_up ``[K, 2 I']`` and down ``[I', K]`` of the shared experts.

    Returns:
      float32 partial sums ``[split, M, top_k, K]`` of the picks, and ``[split', M, K]`` of the
      shared experts (None without them); None where XLA is to do it, in steps.
    """
    weights = [materialize(w) for w in (gate_up, down, *(shared or ())) if isinstance(w, QTensor)]
    if len(weights) < 2 + len(shared or ()):
        return None
    request = resolve_implementation("grouped_matmul", None)
    rows, top_k = index.shape
    if not all(mosaic_gpu.use_matrix_vector("grouped_matmul", request, rows, w) for w in weights):
        return None
    gate_up, down, *more = weights
    picks = index.reshape(-1)
    first = mosaic_gpu.gathered_sums(x, gate_up, picks, (x, more[0]) if more else None)
    if not more:
        y = mosaic_gpu.gathered_sums(gated(first, x.dtype), down, picks, None)
        return y.reshape(y.shape[0], rows, top_k, -1), None
    picked, common = (gated(partials, x.dtype) for partials in first)
    y, z = mosaic_gpu.gathered_sums(picked, down, picks, (common, more[1]))
    return y.reshape(y.shape[0], rows, top_k, -1), z


def route_token(
    x: Rows,
    kernel: jax.Array,
    correction_bias: jax.Array | None,
    *,
    top_k: int,
    normalize: bool,
    norm_min: float,
) -> tuple[jax.Array, jax.Array] | None:
    """Experts ``[M, top_k]`` and weights of each row; None where XLA is to choose them."""
    request = resolve_implementation("router", None)
    hidden, experts = kernel.shape

    def obstacle() -> str | None:
        from pallas_kernels.router.routing import supports_router

        if kernel.dtype != jnp.float32 or not supports_router(experts, hidden):
            return f"no kernel routes {kernel.dtype.name} [{hidden}, {experts}]"
        return mosaic_gpu.mesh_obstacle()

    def preference() -> str | None:
        return mosaic_gpu.routing_preference(experts, top_k)

    if not accept_kernel("router", request, obstacle, preference):
        return None
    from pallas_kernels.router.routing import router_logits, top_k_experts

    return top_k_experts(
        router_logits(x, kernel),
        correction_bias,
        experts=experts,
        top_k=top_k,
        normalize=normalize,
        norm_min=norm_min,
    )
