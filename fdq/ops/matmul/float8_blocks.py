"""Where float8 rows and block-wise float8 weights are multiplied as they are: many rows, Hopper."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.ops import self_check
from fdq.ops.activation import quantize_activation
from fdq.ops.kernels import slower
from fdq.ops.matmul.product import Product
from fdq.ops.prepared_weight import kernel_weight
from fdq.quantizers import quantize_array
from fdq.schemes.scheme import ActivationSpec, WeightSpec
from pallas_kernels.device import MOST_MMA_ROWS, default_device

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight

KERNEL = "float8_blocks"
"""Its name in the tuning table."""

_TOLERANCE = 0.005  # Hopper's float8 sums have 14 bits; of what is rounded to bfloat16 0.002


def unsupported(a: Product, w: KernelWeight) -> str | None:
    """Why the kernel does not multiply this, or is not to."""
    from pallas_kernels.matmul import float8_blocks as kernels

    if a.rows <= MOST_MMA_ROWS:
        return f"{a.rows} rows are few"
    if a.activation != _rows_spec(kernels.BLOCK):
        return f"rows are not float8 with scales per token and {kernels.BLOCK} channels"
    if a.x.dtype.itemsize > 2:
        return f"rows of {a.x.dtype} keep float32 sums"
    reason = kernels.unsupported(w.layout)
    reason = reason or slower(KERNEL, w.layout.format, a.rows, math.prod(w.shape))
    return reason or check().failure(default_device())


def product(codes: jax.Array, scale: jax.Array, w: KernelWeight, dtype: Any) -> jax.Array:
    """float8 rows `[M, K]` times their scales `[M, groups]` times a weight -> `[M, N]`.

    Of `dtype` where it has 16 bits, else float32.
    """
    from pallas_kernels.matmul.float8_blocks import float8_blocks

    return float8_blocks(codes, scale, w, dtype if jnp.dtype(dtype).itemsize == 2 else jnp.float32)


def check() -> self_check.Check:
    """That the kernel is right."""
    return self_check.Check(KERNEL, "float8_e4m3, blocks of 128 x 128", case, _TOLERANCE)


def case() -> tuple[Any, Any]:
    """More groups of K than are in shared memory at a time, and several programs each way.

    Scales differ from block to block and row to row, so that none can stand for another.
    """
    from pallas_kernels.matmul import float8_blocks as kernels

    k, n, rows = 9 * kernels.BLOCK, 2 * kernels.BLOCK, 2 * kernels.BLOCK - 56
    keys = jax.random.split(jax.random.key(0), 2)
    weight = _uneven(jax.random.normal(keys[0], (k, n), jnp.float32), kernels.BLOCK)
    spec = WeightSpec(
        format="float8_e4m3", granularity="block", block_size=(kernels.BLOCK, kernels.BLOCK)
    )
    w = kernel_weight(quantize_array(weight, spec, method="absmax"))
    x = _uneven(jax.random.normal(keys[1], (rows, k), jnp.float32), 1)
    x, scale = quantize_activation(x, _rows_spec(kernels.BLOCK))
    few = MOST_MMA_ROWS + 1
    wanted = kernels.float8_blocks_reference(x, scale, w)
    result = kernels.float8_blocks(x, scale, w, jnp.float32)
    rounded = kernels.float8_blocks(x[:few], scale[:few], w, jnp.bfloat16)
    return [result, rounded.astype(jnp.float32)], [wanted, wanted[:few]]


def _rows_spec(group: int) -> ActivationSpec:
    return ActivationSpec(format="float8_e4m3", granularity="token_group", group_size=group)


def _uneven(a: jax.Array, rows: int) -> jax.Array:
    """Every `rows` rows and 128 columns times a number of their own, from 0.5 to 2."""
    row, column = (lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in (0, 1))
    places = row // rows * 5 + column // 128 * 3
    return a * jnp.exp2((places % 17).astype(jnp.float32) / 8 - 1)
