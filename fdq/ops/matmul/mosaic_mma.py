"""Where products take the tensor cores' kernel: 9 to 64 rows; fewer where a table says so."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fdq.formats.qtensor import QuantizedWeight, materialize
from fdq.ops.kernels import MOSAIC_GPU, tuned
from fdq.ops.matmul.product import Product, takes_integers
from fdq.ops.prepared_weight import WordsWeight
from pallas_kernels.device import MOST_MMA_ROWS, MOST_ROWS

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight
    from pallas_kernels.weights.layout import WeightLayout

KERNEL = "mma_matmul"
"""Its name in the tuning table, where `xla` for 8 rows or fewer leaves them to other kernels."""

INTEGERS = "integer_mma"
"""Its name there for rows of int8 codes."""


def unsupported(a: Product) -> str | None:
    """Why tensor cores do not take a product."""
    return unsupported_activation(a) or unsupported_weight(a.w, a.rows, rows_dtype(a))


def rows_dtype(a: Product) -> Any:
    """Of the rows that tensor cores multiply: codes are int8, or bfloat16, which holds 8 bits."""
    if a.activation is None:
        return a.x.dtype
    if not takes_integers(a.w, a.activation):
        return jnp.bfloat16
    from pallas_kernels.weights.formats import WORD_FORMATS

    words = WORD_FORMATS.get(a.w.spec.format)
    return jnp.int8 if words is not None and words.byte_rows else jnp.bfloat16


def kernel_of(a: Product) -> str:
    """The name of the tensor cores' kernel for it."""
    return INTEGERS if rows_dtype(a) == jnp.int8 else KERNEL


def unsupported_activation(a: Product) -> str | None:
    """Why they do not multiply rows that are quantized so."""
    if a.activation is not None and a.activation.granularity == "token_group":
        return "tensor cores take no activations with scales per token and group"
    return None


def unsupported_weight(w: Any, rows: int, dtype: Any) -> str | None:
    """Why they do not multiply `rows` rows of `dtype` with a weight `[..., K, N]`."""
    if not isinstance(w, QuantizedWeight):
        return "the weight is an array, and the kernels read quantized ones"
    if not isinstance(rows, int) or not 1 <= rows <= MOST_MMA_ROWS:
        return f"the kernels take 1 to {MOST_MMA_ROWS} rows of x, found {rows}"
    reason = WordsWeight.unsupported(w)
    if reason is not None:
        return reason
    from pallas_kernels.matmul import mma

    return mma.unsupported(_layout(w), dtype)


def chosen(a: Product) -> bool:
    """Whether a product that kernels take is the tensor cores'."""
    if a.rows > MOST_ROWS:
        return True
    *_, k, n = a.w.shape
    choice = tuned(kernel_of(a), a.w.spec.format, a.rows, k * n)
    return choice.use == MOSAIC_GPU and unsupported(a) is None


def partial_sums(x: Any, w: KernelWeight) -> jax.Array:
    """Rows (of `row_sources`, or int8 codes) times a weight -> float32 `[split, M, N]`."""
    from pallas_kernels.matmul import mma
    from pallas_kernels.matmul.matrix_vector import multiprocessors

    rows = x.shape[0]
    kernel = INTEGERS if x.dtype == jnp.int8 else KERNEL
    settings = tuned(kernel, w.layout.format, rows, w.layout.k * w.layout.n).config
    config = mma.choose_mma_config(w.layout, rows, multiprocessors())
    return mma.mma_matmul(x, w, config=dataclasses.replace(config, **settings))


def case(weight: KernelWeight) -> tuple[Any, Any]:
    """For the self-check: results and references of both widths of a program, and of float16."""
    from pallas_kernels.matmul import mma
    from pallas_kernels.matmul.matrix_vector import matrix_vector_reference

    x = jax.random.normal(jax.random.key(1), (33, weight.layout.k), jnp.float32)
    rows = [x[:m].astype(jnp.bfloat16) for m in (9, 33)]
    wide = mma.mma_matmul(rows[0], weight, config=mma.MmaConfig(block_columns=256, split=2))
    wanted = [matrix_vector_reference(some, weight)[0] for some in rows]
    of_float16 = partial_sums(rows[0].astype(jnp.float16), weight)
    results = [wide.sum(0), partial_sums(rows[1], weight).sum(0), of_float16.sum(0)]
    return results, [*wanted, wanted[0]]


def integer_case(weight: KernelWeight, rows: jax.Array) -> tuple[Any, Any]:
    """The same of int8 `rows [33, K]`."""
    from pallas_kernels.matmul import mma
    from pallas_kernels.matmul.integer import integer_matrix_vector_reference

    wide = mma.mma_matmul(rows[:9], weight, config=mma.MmaConfig(block_columns=256, split=2))
    results = [wide.sum(0), partial_sums(rows, weight).sum(0)]
    return results, [integer_matrix_vector_reference(x, weight)[0] for x in (rows[:9], rows)]


def _layout(w: QuantizedWeight) -> WeightLayout:
    if isinstance(w, WordsWeight):
        return materialize(w).data.layout
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), w.canonical())
    return WordsWeight.of(abstract).data.layout
