"""Where experts take the tensor cores' kernel: 9 to 64 tokens; fewer where a table says so."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from fdq.ops import self_check
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

INTEGERS = "gathered_integer_mma"
"""Its name there for rows of int8 codes."""


def unsupported(a: GroupedProduct) -> str | None:
    """Why tensor cores do not take a product."""
    return mosaic_mma.unsupported_activation(a) or mosaic_mma.unsupported_weight(
        a.w, a.tokens, mosaic_mma.rows_dtype(a)
    )


def kernel_of(a: GroupedProduct) -> str:
    """The name of the tensor cores' kernel for it."""
    return INTEGERS if mosaic_mma.rows_dtype(a) == jnp.int8 else KERNEL


def chosen(a: GroupedProduct) -> bool:
    """Whether a product that kernels take is the tensor cores'."""
    if a.tokens > MOST_ROWS:
        return True
    *_, k, n = a.w.shape
    choice = tuned(kernel_of(a), a.w.spec.format, a.tokens, k * n)
    return choice.use == MOSAIC_GPU and unsupported(a) is None


def gathered_sums(x: Rows, w: KernelWeight, index: jax.Array, tokens: int) -> jax.Array:
    """Float32 parts `[split, P, N]` of `x[p // picks] @ w[index[p]]`."""
    from pallas_kernels.matmul.gathered_mma import gathered_mma, gathered_mma_config

    kernel = INTEGERS if x.dtype == jnp.int8 else KERNEL
    settings = tuned(kernel, w.layout.format, tokens, w.layout.k * w.layout.n).config
    config = dataclasses.replace(gathered_mma_config(w, index.shape[0]), **settings)
    return gathered_mma(matmul.staged(x), w, index, config=config)


def self_check_of(kernel: str, spec: WeightSpec) -> self_check.Check:
    """The self-check of the kernel of that name, with experts of a spec."""
    return matmul.self_check_of(kernel, spec, functools.partial(_case, kernel, spec))


# Rows of a tile, columns of a program and slices of K, as programs of published models have them.
_CUTS = ((8, 256, 1), (16, 256, 2), (32, 128, 1))


def _case(kernel: str, spec: WeightSpec) -> tuple[list[jax.Array], list[jax.Array]]:
    """One expert has more than a small tile of rows, one has none; the second cut's are float16,
    unless all are codes.
    """
    from pallas_kernels.matmul.gathered import gathered_matrix_vector_reference
    from pallas_kernels.matmul.gathered_mma import gathered_mma
    from pallas_kernels.matmul.mma import MmaConfig

    q = check_cases.sample(spec)
    stack = kernel_weight(jax.tree.map(lambda a: jnp.stack([a, jnp.zeros_like(a), a]), q))
    index = jnp.asarray([2, 0, 0, 2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 0, 2, 2, 2, 2], jnp.int32)
    x = jax.random.normal(jax.random.key(1), (9, q.shape[0]), jnp.float32)
    x = check_cases.codes(*x.shape) if kernel == INTEGERS else x.astype(jnp.bfloat16)
    results = []
    for number, (tile_rows, columns, split) in enumerate(_CUTS):
        rows = x.astype(jnp.float16) if number == 1 and kernel == KERNEL else x
        config = MmaConfig(block_columns=columns, split=split)
        found = gathered_mma(rows, stack, index, config=config, tile_rows=tile_rows)
        results.append(found.sum(0))
    x = x.astype(jnp.float32)
    return results, [gathered_matrix_vector_reference(x, stack, index)[0]] * len(results)
