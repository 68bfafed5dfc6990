"""`matmul` by the kernels of `pallas_kernels`: few rows, quantized weights.

Matrix-vector kernels take up to 8 rows, the tensor cores' kernel up to 64 of 16 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fdq.formats.qtensor import QuantizedWeight
from fdq.ops import self_check
from fdq.ops.activation import activation_values, quantize_activation
from fdq.ops.gates import swiglu
from fdq.ops.kernels import Kernel, slower, tuned
from fdq.ops.matmul import check_cases, mosaic_mma
from fdq.ops.matmul.product import Product, takes_integers
from fdq.ops.placement import sharded
from fdq.ops.prepared_weight import WordsWeight, kernel_weight
from fdq.ops.rows import Gated, Normed, Rows, as_array, flattened
from fdq.schemes.scheme import WeightSpec
from pallas_kernels.device import MOST_ROWS, default_device

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight


class MosaicGpu(Kernel[Product]):
    """One launch, whose rows are normalized, gated and added up as they are staged."""

    def unsupported(self, arguments: Product) -> str | None:
        """Weights and numbers of rows that no kernel takes, and sharded arrays."""
        a = arguments
        many = isinstance(a.rows, int) and a.rows > MOST_ROWS
        reason = mosaic_mma.unsupported(a) if many else unsupported_weight(a.w, a.rows)
        return reason or sharded(a.x, a.w)

    def declined(self, arguments: Product) -> str | None:
        """Canonical weights, what is slower than XLA, and what is wrong on this device."""
        w, rows = arguments.w, arguments.rows
        return unprepared(w) or preferred(_kernel_of(arguments, kernel_weight(w)), w, rows)

    def __call__(self, arguments: Product) -> jax.Array:
        """Float32 parts `[split, ..., N]`."""
        a, weight = arguments, kernel_weight(arguments.w)
        kernel = _kernel_of(a, weight)
        if kernel in (mosaic_mma.KERNEL, mosaic_mma.INTEGERS):
            parts = _of_tensor_cores(a, weight)
        elif a.activation is None:
            parts = partial_sums(a.x, weight)
        else:
            x = flattened(as_array(a.x))
            codes, scale = quantize_activation(x, a.activation, a.activation_scale, path=a.path)
            if kernel == "integer_matrix_vector":
                parts = integer_sums(codes, weight) * scale[None]
            else:
                values = activation_values(codes, scale, a.activation.group_size, jnp.float32)
                parts = partial_sums(values, weight)
        return parts.reshape(parts.shape[0], *a.x.shape[:-1], parts.shape[-1])


def unsupported_weight(w: Any, rows: int) -> str | None:
    """Why no kernel multiplies `rows` rows with a weight `[..., K, N]`."""
    if not isinstance(w, QuantizedWeight):
        return "the weight is an array, and the kernels read quantized ones"
    if not isinstance(rows, int) or not 1 <= rows <= MOST_ROWS:
        return f"the kernels take 1 to {MOST_ROWS} rows of x, found {rows}"
    return WordsWeight.unsupported(w)


def unprepared(w: QuantizedWeight) -> str | None:
    """Why a weight is left to XLA unless the kernel is asked for."""
    reason = "the weight is not in the kernels' layout (fdq.prepare puts it there)"
    return None if isinstance(w, WordsWeight) else reason


def preferred(
    kernel: str, w: QuantizedWeight, rows: int, check: self_check.Check | None = None
) -> str | None:
    """Why XLA is preferred to a kernel: it is faster, or the kernel is wrong."""
    reason = slower(kernel, w.spec.format, rows, math.prod(w.shape[-2:]))
    return reason or (check or self_check_of(kernel, w.spec)).failure(default_device())


def staged(x: Rows) -> Any:
    """Rows as the kernels take them, `[M, K]`; what they cannot finish is finished here."""
    from pallas_kernels.matmul import row_sources

    x = flattened(x)
    if isinstance(x, Normed):
        return row_sources.Normed(x.x.reshape(x.shape), x.scale, x.epsilon)
    if isinstance(x, Gated) and x.gate is swiglu and x.sums.bias is None and x.sums.order is None:
        return row_sources.Gated(x.sums.parts, x.dtype)
    return as_array(x)


def partial_sums(x: Rows, w: KernelWeight) -> jax.Array:
    """Rows times a weight -> float32 `[split, M, N]`."""
    from pallas_kernels.matmul.matrix_vector import matrix_vector

    rows = staged(x)
    return matrix_vector(rows, w, config=_config("matrix_vector", w, rows.shape[0]))


def _of_tensor_cores(a: Product, weight: KernelWeight) -> jax.Array:
    """Float32 parts; quantized rows as their codes, times their scales.

    Not by the kernel, which would want the scales as an array: a launch more.
    """
    if a.activation is None:
        return mosaic_mma.partial_sums(staged(a.x), weight)
    x = flattened(as_array(a.x))
    codes, scale = quantize_activation(x, a.activation, a.activation_scale, path=a.path)
    return mosaic_mma.partial_sums(codes.astype(mosaic_mma.rows_dtype(a)), weight) * scale[None]


def integer_sums(codes: jax.Array, w: KernelWeight) -> jax.Array:
    """int8 rows `[M, K]` times integer codes -> float32 `[split, M, N]` before the x scale."""
    from pallas_kernels.matmul.integer import integer_matrix_vector

    name = "integer_matrix_vector"
    return integer_matrix_vector(codes, w, config=_config(name, w, codes.shape[0]))


def _kernel_of(arguments: Product, weight: KernelWeight) -> str:
    """The kernel's name in the tuning table."""
    if mosaic_mma.chosen(arguments):
        return mosaic_mma.kernel_of(arguments)
    from pallas_kernels.matmul.integer import has_kernel

    if takes_integers(arguments.w, arguments.activation) and has_kernel(weight):
        return "integer_matrix_vector"
    return "matrix_vector"


def _config(kernel: str, w: KernelWeight, rows: int) -> Any:
    """How the tuning table cuts a product, on top of the kernel's own choice."""
    from pallas_kernels.matmul.matrix_vector import choose_config, multiprocessors

    settings = tuned(kernel, w.layout.format, rows, w.layout.k * w.layout.n).config
    config = choose_config(w.layout, rows, multiprocessors())
    return dataclasses.replace(config, **settings)


def self_check_of(
    kernel: str, spec: WeightSpec, case: Any = None, tolerance: float = self_check.TOLERANCE
) -> self_check.Check:
    """The self-check of a kernel of products, with weights of a spec; `case` is another's own."""
    scales = f"{spec.granularity} {spec.group_size or ''}".strip()
    detail = f"{spec.format}, {scales} scales of {spec.scale_dtype}, zero point {spec.zero_point}"
    if spec.block_size is not None:
        detail += f", blocks of {' x '.join(map(str, spec.block_size))}"
    if case is None and kernel == "gathered_matrix_vector":
        case = functools.partial(check_cases.gathered, spec)
    case = case or functools.partial(check_cases.product, kernel, spec)
    return self_check.Check(kernel, detail, case, tolerance)
