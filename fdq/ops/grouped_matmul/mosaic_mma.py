"""Where experts take the tensor cores' kernel: 9 to 64 tokens; fewer where a table says so."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fdq.ops.grouped_matmul.product import GroupedProduct
from fdq.ops.kernels import MOSAIC_GPU, tuned
from fdq.ops.matmul import check_cases, mosaic_mma
from fdq.ops.matmul import mosaic_gpu as matmul
from fdq.ops.prepared_weight import kernel_weight
from fdq.ops.rows import Rows
from fdq.schemes.scheme import WeightSpec
from pallas_kernels.device import MOST_ROWS

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight

KERNEL = "gathered_mma"
"""Its name in the tuning table, where `xla` for 8 tokens or fewer leaves them to the other one."""


def unsupported(a: GroupedProduct) -> str | None:
    """Why tensor cores do not take a product."""
    return mosaic_mma.unsupported_weight(a.w, a.tokens, a.x.dtype)


def chosen(a: GroupedProduct) -> bool:
    """Whether a product that kernels take is the tensor cores'."""
    if a.tokens > MOST_ROWS:
        return True
    *_, k, n = a.w.shape
    choice = tuned(KERNEL, a.w.spec.format, a.tokens, k * n)
    return choice.use == MOSAIC_GPU and unsupported(a) is None


def gathered_sums(x: Rows, w: KernelWeight, index: jax.Array, tokens: int) -> jax.Array:
    """Float32 parts `[split, P, N]` of `x[p // picks] @ w[index[p]]`."""
    from pallas_kernels.matmul.gathered_mma import gathered_mma, gathered_mma_config

    settings = tuned(KERNEL, w.layout.format, tokens, w.layout.k * w.layout.n).config
    config = dataclasses.replace(gathered_mma_config(w, index.shape[0]), **settings)
    return gathered_mma(matmul.staged(x), w, index, config=config)


def case(spec: WeightSpec) -> tuple[jax.Array, jax.Array]:
    """For the self-check: one expert has more than a tile of rows, one has none."""
    from pallas_kernels.matmul.gathered import gathered_matrix_vector_reference

    q = check_cases.sample(spec)
    stack = kernel_weight(jax.tree.map(lambda a: jnp.stack([a, jnp.zeros_like(a), a]), q))
    index = jnp.asarray([2, 0, 0, 2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 0, 2, 2, 2, 2], jnp.int32)
    x = jax.random.normal(jax.random.key(1), (9, q.shape[0]), jnp.float32).astype(jnp.bfloat16)
    found = gathered_sums(x, stack, index, 9)
    return found.sum(0), gathered_matrix_vector_reference(x, stack, index)[0]
