"""Products with experts that a router picked, at small batch: each pick reads its own expert only.

    y[p, n] = sum_k x[p // picks, k] * w[index[p], k, n]        picks = P / T

A mixture-of-experts layer of a decode step is two launches: gate and up of every pick, then down,
whose prologue adds the partial sums up and gates them (`Gated`). A `shared` weight, applied to all
rows of its own x, rides along in the same launch as more programs of the grid: the shared experts
of a layer cost no launch of their own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.device import MOST_ROWS
from pallas_kernels.matmul.matrix_vector import (
    MatrixVectorConfig,
    Product,
    choose_config,
    kernel_name,
    matrix_vector_reference,
    multiprocessors,
)
from pallas_kernels.matmul.row_sources import Rows, finished, readable, rows_cotangent, rows_shape
from pallas_kernels.mosaic.launch import launch
from pallas_kernels.transformations import batchable, differentiable
from pallas_kernels.typing import Array, Int
from pallas_kernels.weights.decoded_weight import decoded_weight
from pallas_kernels.weights.kernel_weight import KernelWeight
from pallas_kernels.weights.layout import WeightLayout


def gathered_matrix_vector_reference(
    x: Rows,
    w: KernelWeight,
    index: Int[Array, " p"],
    shared: tuple[Rows, KernelWeight] | None = None,
) -> Any:
    """The meaning of `gathered_matrix_vector`: of decoded weights, split 1."""
    rows = finished(x).astype(jnp.float32)
    rows = rows[jnp.arange(index.shape[0]) // (index.shape[0] // rows.shape[0])]
    picked = jax.tree.map(lambda a: a[index], w)
    product = jnp.einsum(
        "pk,pkn->pn", rows, decoded_weight(picked), precision=lax.Precision.HIGHEST
    )
    if shared is None:
        return product[None]
    return product[None], matrix_vector_reference(*shared)


def gathered_matrix_vector(
    x: Rows,
    w: KernelWeight,
    index: Int[Array, " p"],
    *,
    shared: tuple[Rows, KernelWeight] | None = None,
    config: MatrixVectorConfig | None = None,
    shared_config: MatrixVectorConfig | None = None,
) -> Any:
    """Partial sums of `x[p // picks] @ w[index[p]]`, float32 `[split, P, N]`, in one launch.

    Rows x are `[T, K]`, T a divisor of P: with `T = P` every pick has its own (the down product).
    `shared` are rows `[M, K']` (M at most 8) and a weight `[K', N']`: with it the result is a
    pair, the second `[split', M, N']`. Configs are chosen by the device if None. Shapes that do
    not fit are a ValueError.
    """
    t, k = rows_shape(x, "gathered_matrix_vector")
    picks = index.size
    if w.words.ndim != 3 or k != w.layout.k or index.ndim != 1 or not picks or picks % t:
        raise ValueError(
            f"gathered_matrix_vector: x {(t, k)} needs w [E, K={k}, N] and index [P] with "
            f"P a multiple of T={t}; found w {w.shape} and index {index.shape}."
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"gathered_matrix_vector: expected int32 index [P], found {index.dtype.name}."
        )
    if config is None:
        config = gathered_config(w.layout, picks)
    if shared is not None:
        rows, weight = shared
        shape = rows_shape(rows, "gathered_matrix_vector")
        if weight.words.ndim != 2 or shape[1] != weight.layout.k or shape[0] > MOST_ROWS:
            raise ValueError(
                f"gathered_matrix_vector: shared rows {shape} need a weight [K, N] and "
                f"at most {MOST_ROWS} rows; found {weight.shape}."
            )
        if shared_config is None:
            # The picks fill the device already.
            few = -(-multiprocessors() // 4)
            shared_config = choose_config(weight.layout, shape[0], few)
        shared = (readable(rows, weight.layout, shape[0]), weight)
    x, index = readable(x, w.layout, 1), index.astype(jnp.int32)
    shared_rows, shared_weight = (None, None) if shared is None else shared
    run = _transformable(config, shared_config)
    return run((x, shared_rows), w, index, shared_weight)


def gathered_config(layout: WeightLayout, picks: int) -> MatrixVectorConfig:
    """The default for `picks` products at a time, for a device that nobody tuned for."""
    return choose_config(layout, 1, -(-multiprocessors() // picks))


def _transformable(config, shared_config):
    """The launch with its gradient with respect to rows, and with a launch for each of a batch."""

    def kernel(rows, w, index, shared_weight):
        x, shared_rows = rows
        shared = None if shared_weight is None else (shared_rows, shared_weight)
        return _gathered(x, w, index, shared, config, shared_config)

    def gradient(cotangent, rows, w, index, shared_weight):
        x, shared_rows = rows
        of_picks = cotangent if shared_weight is None else cotangent[0]
        decoded = decoded_weight(jax.tree.map(lambda a: a[index], w))
        of_x = rows_cotangent(of_picks, x, w, decoded, index.shape[0] // x.shape[0])
        if shared_weight is None:
            return (of_x, None), None, None, None
        decoded = decoded_weight(shared_weight)
        of_shared = rows_cotangent(cotangent[1], shared_rows, shared_weight, decoded)
        return (of_x, of_shared), None, None, None

    return differentiable(batchable(kernel), gradient)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _gathered(x, w, index, shared, config, shared_config) -> Any:
    picks = index.shape[0]
    per_row = picks // x.shape[0]
    products = [Product(x, w, 1, config)]
    outputs = [jax.ShapeDtypeStruct((products[0].split, picks, w.layout.padded_n), jnp.float32)]
    programs = products[0].programs * picks
    grid = programs
    if shared is not None:
        more = Product(shared[0], shared[1], shared[0].shape[0], shared_config)
        products.append(more)
        shape = (more.split, more.tile.rows, more.weight.layout.padded_n)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        grid += more.programs

    def body(*refs):
        refs = iter(refs)
        index_ref = next(refs)
        inputs = [product.take_inputs(refs) for product in products]
        out_refs = [next(refs) for _ in products]
        scratch = [[next(refs) for _ in product.tile.scratch] for product in products]
        program = lax.axis_index("program")

        def pick():
            product = products[0]
            # Neighbouring programs read neighbouring columns of one expert.
            p = program // product.programs
            place = product.place(program % product.programs)
            where = {"row": p // per_row, "out_row": p, "expert": index_ref[p]}
            product.run(inputs[0], scratch[0], *place, out_refs[0], **where)

        if shared is None:
            pick()
            return
        pl.when(program < programs)(pick)

        @pl.when(program >= programs)
        def _():
            place = products[1].place(program - programs)
            products[1].run(inputs[1], scratch[1], *place, out_refs[1])

    name = "gathered" if shared is None else "gathered_and_shared"
    body.__name__ = kernel_name(name, w.layout, 1)
    out = launch(
        body,
        (index, *(a for product in products for a in product.operands)),
        out_type=tuple(outputs),
        grid=(grid,),
        grid_names=("program",),
        scratch_types=tuple(s for product in products for s in product.tile.scratch),
    )
    results = [a[..., : p.weight.layout.n] for a, p in zip(out, products, strict=True)]
    return results[0] if shared is None else tuple(results)
