"""What the self-checks of products compute: programs cut as those of published models are.

A case is traced once, into one program: all rows, widths and sources of rows that a kernel is made
for, and their references. It knows nothing of the weight that asked, so that the next one of the
same format finds the answer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fdq.formats.qtensor import QTensor
from fdq.ops.choice import trace_target
from fdq.ops.matmul import mosaic_mma
from fdq.ops.prepared_weight import kernel_weight
from fdq.quantizers import quantize_array
from fdq.quantizers.quantizer import QUANTIZERS
from fdq.schemes.scheme import WeightSpec
from pallas_kernels.device import default_device
from pallas_kernels.tuning import choices

WIDTHS = {1: (256, 128), 8: (512, 256)}
"""Of one and of many rows, columns of the programs that layers of published models are cut into."""

ROWS = tuple(WIDTHS)
_GATHERED = "gathered_matrix_vector"
_MANY = 28672  # columns of Llama-3-8B's gate and up


def sample(spec: WeightSpec, columns: int = 512) -> QTensor:
    """A small weight: whole groups of 512 rows or more, so four segments; seeded."""
    rows = math.lcm(spec.group_size or 1, 128)
    values = jax.random.normal(jax.random.key(0), (rows * -(-512 // rows), columns), jnp.float32)
    quick = QUANTIZERS["absmax"].unsupported(spec, values.dtype) is None
    return quantize_array(values, spec, method="absmax" if quick else None)


def configs(kernel: str, layout: Any, rows: int, picks: int | None = None) -> list[Any]:
    """How the device cuts products of `rows` rows: for both of `WIDTHS`, and as its table says.

    Widest programs have all of K, the others share it.
    """
    from pallas_kernels.matmul.gathered import gathered_config
    from pallas_kernels.matmul.matrix_vector import choose_config, multiprocessors

    found = []
    kind = default_device().device_kind
    for settings in choices.settings(kind, kernel, layout.format, rows=rows):
        widest = max(WIDTHS[rows])
        for width in WIDTHS[rows]:
            # Of so many columns that this width, and the steps that go with it, are chosen.
            n = _MANY if width == widest else 17 * width
            wide = dataclasses.replace(layout, k=4096, n=n)
            if picks is None:
                chosen = choose_config(wide, rows, multiprocessors())
            else:
                chosen = gathered_config(wide, picks)
            chosen = dataclasses.replace(chosen, **({"block_columns": width} | settings))
            split = 1 if width == widest else 2
            found.append(dataclasses.replace(chosen, split=settings.get("split", split)))
    return list(dict.fromkeys(found))


def product(kernel: str, spec: WeightSpec) -> tuple[list[Any], list[Any]]:
    """Results and references of a kernel for dense weights."""
    weight = kernel_weight(sample(spec))
    if kernel == mosaic_mma.KERNEL:
        return mosaic_mma.case(weight)
    if kernel == mosaic_mma.INTEGERS:
        return mosaic_mma.integer_case(weight, codes(33, weight.layout.k))
    if kernel == "integer_matrix_vector":
        return _of_integers(kernel, weight)
    from pallas_kernels.matmul.matrix_vector import matrix_vector, matrix_vector_reference

    results, wanted = [], []
    for rows in ROWS:
        each = sources(weight.layout.k, rows)
        for number, config in enumerate(configs(kernel, weight.layout, rows)):
            x = each[number % 2]
            results.append(matrix_vector(x, weight, config=config).sum(0))
            wanted.append(matrix_vector_reference(x, weight)[0])
    return results, wanted


def sources(k: int, rows: int) -> tuple[Any, Any]:
    """Rows to be normalized (one), or in 16 bits as they are (several); and rows to be gated.

    What is finished by the kernel is in float32: rounded to 16 bits, two that are correct may
    differ by a bit.
    """
    from pallas_kernels.matmul.row_sources import Gated, Normed

    keys = jax.random.split(jax.random.key(rows), 3)
    x = jax.random.normal(keys[0], (rows, k), jnp.float32)
    parts = jax.random.normal(keys[1], (2, rows, 2 * k), jnp.float32)
    if rows == 1:
        scale = 1 + jax.random.uniform(keys[2], (k,), jnp.float32)
        return Normed(x, scale, 1e-6), Gated(parts, jnp.float32)
    dtype = jnp.bfloat16 if trace_target().has_bfloat16 else jnp.float16
    return x.astype(dtype), Gated(parts, jnp.float32)


def codes(rows: int, k: int) -> jax.Array:
    """int8 rows `[rows, k]`."""
    return jax.random.randint(jax.random.key(rows), (rows, k), -127, 128).astype(jnp.int8)


def _of_integers(kernel: str, weight: Any) -> tuple[list[Any], list[Any]]:
    from pallas_kernels.matmul.integer import (
        integer_matrix_vector,
        integer_matrix_vector_reference,
    )

    results, wanted = [], []
    for rows in ROWS:
        x = codes(rows, weight.layout.k)
        reference = integer_matrix_vector_reference(x, weight)[0]
        for config in configs(kernel, weight.layout, rows):
            results.append(integer_matrix_vector(x, weight, config=config).sum(0))
            wanted.append(reference)
    return results, wanted


def gathered(spec: WeightSpec) -> tuple[list[Any], list[Any]]:
    """The same of experts: two of three are picked, with a shared weight along and without."""
    from pallas_kernels.matmul import gathered as kernels

    q = sample(spec)
    weight = kernel_weight(q)
    stack = kernel_weight(jax.tree.map(lambda a: jnp.stack([a, jnp.zeros_like(a), a]), q))
    index = jnp.asarray([2, 0, 0, 2], jnp.int32)
    x, gated = sources(q.shape[0], 1)
    _, each = sources(q.shape[0], index.size)
    results, wanted = [], []
    for number, config in enumerate(configs(_GATHERED, stack.layout, 1, index.size)):
        if number % 2:
            found = [kernels.gathered_matrix_vector(x, stack, index, config=config)]
            reference = [kernels.gathered_matrix_vector_reference(x, stack, index)]
        else:
            shared = gated, weight
            found = kernels.gathered_matrix_vector(
                each, stack, index, shared=shared, config=config, shared_config=config
            )
            reference = kernels.gathered_matrix_vector_reference(each, stack, index, shared)
        results += [parts.sum(0) for parts in found]
        wanted += [parts[0] for parts in reference]
    return results, wanted
