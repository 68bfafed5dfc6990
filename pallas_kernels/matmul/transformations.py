"""What `jax.vmap` and `jax.grad` do with a matrix kernel: launch again, or decode the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.row_sources import Rows, finished
from pallas_kernels.weights.kernel_weight import KernelWeight


def batchable(
    kernel: Callable[..., Any], fold: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """`kernel` with a rule for `jax.vmap`.

    Args:
      kernel: of pytrees.
      fold: ``(axis size, which leaves are batched, *arguments)`` -> the batched result of one
        launch, or None where it takes several. Then, and without it, one launch follows another.
    """

    @jax.custom_batching.custom_vmap
    def run(*arguments):
        return kernel(*arguments)

    @run.def_vmap
    def _rule(axis_size, batched, *arguments):
        out = None if fold is None else fold(axis_size, batched, *arguments)
        if out is None:
            leaves, tree = jax.tree.flatten(arguments)
            which = jax.tree.leaves(batched)

            def one(some):
                some = iter(some)
                all_leaves = [next(some) if b else a for a, b in zip(leaves, which, strict=True)]
                return run(*jax.tree.unflatten(tree, all_leaves))

            out = lax.map(one, [a for a, b in zip(leaves, which, strict=True) if b])
        return out, jax.tree.map(lambda _: True, out)

    return run


def differentiable(
    kernel: Callable[..., Any], gradient: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """`kernel` with a gradient.

    Args:
      kernel: of pytrees.
      gradient: ``(cotangent, *arguments)`` -> a cotangent for each argument, None for no gradient.
    """

    @jax.custom_vjp
    def run(*arguments):
        return kernel(*arguments)

    def forward(*arguments):
        return run(*arguments), arguments

    def backward(arguments, cotangent):
        return gradient(cotangent, *arguments)

    run.defvjp(forward, backward)
    return run


def rows_cotangent(
    cotangent: jax.Array, x: Rows, w: KernelWeight, decoded: jax.Array, picks: int = 1
) -> Rows:
    """The cotangent of x from that of the partial sums.

    Args:
      cotangent: float32 ``[split, P, N]``.
      x: rows ``[T, K]``.
      w: the weight, for its layout.
      decoded: float32 ``[K, N]``, or ``[P, K, N]`` of the experts picked.
      picks: P / T.
    """
    parts = cotangent.shape[0]
    rows = w.layout.segments * w.layout.segment
    pad = [(0, 0)] * (decoded.ndim - 2) + [(0, rows - decoded.shape[-2]), (0, 0)]
    pieces = jnp.pad(decoded, pad).reshape(*decoded.shape[:-2], parts, rows // parts, -1)
    formula = "spn,skn->psk" if decoded.ndim == 2 else "spn,pskn->psk"
    found = jnp.einsum(formula, cotangent, pieces, precision=lax.Precision.HIGHEST)
    found = found.reshape(-1, picks, rows).sum(axis=1)[:, : w.layout.k]
    values, finish = jax.vjp(finished, x)
    return finish(found.astype(values.dtype))[0]
