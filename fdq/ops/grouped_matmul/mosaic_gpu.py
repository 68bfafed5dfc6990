"""`grouped_matmul` by the gathering kernels: only experts that were picked are read, in one launch.

Up to 8 tokens each pick reads its own; from 9 to 64 on tensor cores, several picks of an expert
read it together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.grouped_matmul import mosaic_mma
from fdq.ops.grouped_matmul.product import (
    GroupedImplementation,
    GroupedProduct,
    quantized_rows,
    scale_each,
)
from fdq.ops.kernels import Kernel, tuned
from fdq.ops.matmul import mosaic_gpu as matmul
from fdq.ops.matmul import mosaic_mma as dense_mma
from fdq.ops.placement import sharded
from fdq.ops.prepared_weight import kernel_weight
from fdq.ops.rows import Rows, Sums, as_array, flattened
from pallas_kernels.device import MOST_ROWS

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight

_KERNEL = "gathered_matrix_vector"


class MosaicGpu(Kernel[GroupedProduct], GroupedImplementation):
    """One launch for all picks; of few tokens with the shared experts as programs of its grid."""

    def unsupported(self, arguments: GroupedProduct) -> str | None:
        """Weights, scales and numbers of rows that no kernel takes, and sharded arrays."""
        a = arguments
        if reason := scale_each(a):
            return reason
        many = a.tokens > MOST_ROWS
        reason = mosaic_mma.unsupported(a) if many else matmul.unsupported_weight(a.w, a.tokens)
        return reason or sharded(a.x, a.w)

    def declined(self, arguments: GroupedProduct) -> str | None:
        """Canonical weights, what is slower than XLA, and what is wrong on this device."""
        w = arguments.w
        if reason := matmul.unprepared(w):
            return reason
        kernel, check = _KERNEL, None
        if mosaic_mma.chosen(arguments):
            kernel = mosaic_mma.kernel_of(arguments)
            check = mosaic_mma.self_check_of(kernel, w.spec)
        return matmul.preferred(kernel, w, arguments.tokens, check)

    def joins(self, arguments: GroupedProduct) -> bool:
        """Where `beside` is a product that the launch could be of by itself."""
        b = arguments.beside
        if arguments.activation is not None or mosaic_mma.chosen(arguments):
            return False
        if b is None or b.activation is not None or matmul.unsupported_weight(b.w, b.rows):
            return False
        return matmul.unprepared(b.w) is None or matmul.unprepared(arguments.w) is not None

    def __call__(self, arguments: GroupedProduct) -> Any:
        """Float32 parts `[split, *index.shape, N]`, with `beside` also `[split', ..., N']`."""
        a, b = arguments, arguments.beside
        shared = None if b is None else (b.x, kernel_weight(b.w))
        index = a.index.reshape(-1)
        on_tensor_cores = mosaic_mma.chosen(a)
        (x, scale), more = _rows(a, on_tensor_cores), None
        if on_tensor_cores:
            parts = mosaic_mma.gathered_sums(x, kernel_weight(a.w), index, a.tokens)
        else:
            if a.shard:  # what is computed of others' rows does not count
                index = jnp.minimum(index, a.w.shape[0] - 1)
            parts, more = gathered_sums(x, kernel_weight(a.w), index, shared)
        if scale is not None:
            parts = parts * scale[None]
        parts = parts.reshape(parts.shape[0], *a.index.shape, parts.shape[-1])
        if b is None or more is None:
            return parts
        return parts, more.reshape(more.shape[0], *b.x.shape[:-1], more.shape[-1])

    def combine(self, sums: Sums, weights: jax.Array) -> jax.Array:
        """Term by term and not rounded in between: nothing that XLA would launch by itself."""
        total = dataclasses.replace(sums, dtype=jnp.float32).value()
        terms = [total[..., p, :] * weights[..., p, None] for p in range(weights.shape[-1])]
        return functools.reduce(jnp.add, terms).astype(sums.dtype)


def _rows(a: GroupedProduct, on_tensor_cores: bool) -> tuple[Rows, jax.Array | None]:
    """Rows as the kernels take them, and what the product of each pick is to be multiplied by.

    Quantized rows are codes for tensor cores, else values.
    """
    if a.activation is None:
        return a.x, None
    if on_tensor_cores:
        return quantized_rows(a, dense_mma.rows_dtype(a))
    x = flattened(as_array(a.x))
    codes, scale = quantize_activation(x, a.activation, a.activation_scale, path=a.path)
    return activation_values(codes, scale, a.activation.group_size, jnp.float32), None


def gathered_sums(
    x: Rows, w: KernelWeight, index: jax.Array, shared: tuple[Rows, KernelWeight] | None
) -> tuple[jax.Array, Any]:
    """Float32 parts `[split, P, N]` of `x[p // picks] @ w[index[p]]`, and those of `shared`."""
    from pallas_kernels.matmul.gathered import gathered_config, gathered_matrix_vector

    rows = matmul.staged(x)
    settings = tuned(_KERNEL, w.layout.format, rows.shape[0], w.layout.k * w.layout.n).config
    config = dataclasses.replace(gathered_config(w.layout, index.shape[0]), **settings)
    if shared is None:
        return gathered_matrix_vector(rows, w, index, config=config), None
    more = matmul.staged(shared[0]), shared[1]
    return gathered_matrix_vector(rows, w, index, config=config, shared=more)
