"""`grouped_matmul`: every row of x times the weight of the expert that was picked for it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QuantizedWeight, dequantize
from fdq.ops.dots import exact_dot
from fdq.ops.grouped_matmul.mosaic_gpu import MosaicGpu
from fdq.ops.grouped_matmul.product import GroupedProduct
from fdq.ops.grouped_matmul.xla import Xla, for_each_expert, pick_expert
from fdq.ops.implementation import Op
from fdq.ops.matmul import api as matmul
from fdq.ops.matmul import derivative
from fdq.ops.matmul.product import Product, parse_activation
from fdq.ops.placement import in_auto_axes, spec_entry
from fdq.ops.rows import Gated, Normed, Rows, Sums, as_array
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.typing import Array, Float, Int, Shaped

GROUPED_MATMUL: Op[GroupedProduct] = Op("grouped_matmul", MosaicGpu(), Xla())


def grouped_matmul(
    x: Shaped[Array, "t k"],
    w: QuantizedWeight | Float[Array, "e k n"],
    expert_index: Int[Array, " t"] | Int[Array, "t picks"],
    *,
    activation: ActivationSpec | str | None = None,
    activation_scale: jax.Array | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    path: str = "<array>",
) -> Float[Array, "t n"] | Float[Array, "t picks n"]:
    """`y[t] = x[t] @ w[expert_index[t]]`.

    Up to one row an expert (decode), each row reads the codes of its own expert and decodes them
    on the way, as `matmul` does for one row. With more rows (prefill) they are sorted by expert
    and taken in tiles of one expert each, so that an expert is decoded once a tile, experts
    without rows never, and no row is dropped.

    Args:
      x: `[T, K]`.
      w: `[E, K, N]`, an array, a QTensor or a prepared weight.
      expert_index: int `[T]`, or `[T, picks]` for several experts a row; each in `0 .. E - 1`.
      activation: as in `matmul`.
      activation_scale: one scale for all experts, or `[E]`.
      implementation: as in `matmul`.
      out_dtype: as in `matmul`.
      path: as in `matmul`.

    Returns:
      `[T, N]`, or `[T, picks, N]`. Gradients are those of the decoded weights, as in `matmul`;
      there is no forward mode.
    """
    settings = {"dtype": out_dtype, "path": path}
    spec = parse_activation(activation)
    arguments = GroupedProduct(x, w, spec, activation_scale, index=expert_index, **settings)
    return grouped_product(arguments, implementation=implementation)[0].value()


def grouped_product(
    arguments: GroupedProduct, weights: jax.Array | None = None, implementation: str | None = None
) -> tuple[Sums, Sums | None]:
    """The product, and the one beside it, their sums left to whoever reads them.

    With `weights`, float32 `[T, picks]`, the picks of a row are added up: `[T, N]`.
    """
    a, beside = arguments, arguments.beside
    run: Any = GROUPED_MATMUL.choose(a, implementation)
    joined = beside is not None and run.joins(a)
    other = (beside.x, beside.w) if beside is not None and joined else None
    call = functools.partial(_parts, run, a.activation, a.picks, a.path)
    arrays = (a.x, a.w, a.index, a.activation_scale, other)
    with jax.named_scope("grouped_matmul"):
        found = in_auto_axes(call, *arrays, result=lambda: _axes(a))
    parts, more = found if joined else (found, None)
    sums = Sums(parts, dtype=a.dtype)
    if weights is not None:
        sums = Sums.of(run.combine(sums, weights))
    if beside is None:
        return sums, None
    return sums, Sums(more, beside.bias, beside.dtype) if joined else matmul.product(beside)


def _axes(a: GroupedProduct) -> list[Any]:
    rows, columns = matmul.row_axes(a.x), spec_entry(jax.tree.leaves(a.w)[0], -1)
    return [None, *rows, *[None] * (a.index.ndim - len(rows)), columns]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _parts(run, activation, picks, path, x, w, index, activation_scale, beside):
    other = None if beside is None else Product(*beside)
    settings = {"index": index, "beside": other, "path": path}
    return run(GroupedProduct(x, w, activation, activation_scale, **settings))


def _forward(run, activation, picks, path, *given):
    x, w, index, activation_scale, beside = jax.tree.map(lambda leaf: leaf.value, given)
    wanted = _wanted(given[1])
    derivative.check(w, _any(wanted), _any(_wanted(given[3])), path)
    y = _parts(run, activation, picks, path, x, w, index, activation_scale, beside)
    other = None
    if beside is not None:
        also = _wanted(given[4][1])
        derivative.check(beside[1], _any(also), False, path)
        other = beside[0] if _any(also) else _kept_rows(beside[0]), beside[1], also
    # The rows themselves are needed for the gradient of a weight only.
    kept = x if _any(wanted) else _kept_rows(x)
    return y, (kept, w, wanted, index, activation_scale, other)


def _backward(run, activation, picks, path, residuals, cotangents):
    kept, w, wanted, index, activation_scale, beside = residuals
    if beside is None:
        cotangents = (cotangents,)
    # A sum's parts have one reader, which adds them up: their cotangents are equal.
    g, *more = [derivative.instantiated(c, c)[0] for c in cotangents]
    g, picked = g.reshape(index.size, g.shape[-1]), index.reshape(-1)
    experts, k = w.shape[0], w.shape[1]

    def transposed(rows, expert):
        one = pick_expert(w, expert)
        decoded = dequantize(one) if isinstance(one, QuantizedWeight) else one.astype(jnp.float32)
        return exact_dot(rows, decoded, axis=1)

    dx = for_each_expert(transposed, g, picked, experts, k)
    dx = dx.reshape(-1, picks, k).sum(axis=1) if picks > 1 else dx
    dw = None
    if _any(wanted):
        x = as_array(kept).reshape(-1, k)
        if isinstance(w, QuantizedWeight):
            x = derivative.multiplied_rows(x, activation, activation_scale, path)
        x = jnp.repeat(x, picks, axis=0)

        def weight_gradient(expert):
            mine = (picked == expert)[:, None]
            rows = jnp.where(mine, x, jnp.zeros_like(x)).astype(jnp.float32)
            return _weight_cotangent(pick_expert(w, expert), wanted, exact_dot(rows.T, g))

        dw = lax.map(weight_gradient, jnp.arange(experts, dtype=jnp.int32))
    other = None
    if beside is not None:
        rows, w, also = beside
        g = more[0].reshape(-1, more[0].shape[-1])
        dx_beside = exact_dot(g, dequantize(w), axis=1)
        dw_beside = None
        if _any(also):
            x = as_array(rows).reshape(-1, w.shape[0]).astype(jnp.float32)
            dw_beside = _weight_cotangent(w, also, exact_dot(x.T, g))
        other = _rows_cotangent(rows, dx_beside), dw_beside
    return _rows_cotangent(kept, dx), dw, None, None, other


_parts.defvjp(_forward, _backward, symbolic_zeros=True)


def _wanted(given: Any) -> tuple[Any, ...]:
    """Of each leaf `()` where its gradient is wanted and None where not: part of the structure."""
    return tuple(() if leaf.perturbed else None for leaf in jax.tree.leaves(given))


def _any(wanted: tuple[Any, ...]) -> bool:
    """Whether the gradient of any leaf is wanted."""
    return any(flag is not None for flag in wanted)


def _weight_cotangent(w: Any, wanted: tuple[Any, ...], dw: jax.Array) -> Any:
    """The cotangent of one weight, array or quantized, from that of its float32 values."""
    if not isinstance(w, QuantizedWeight):
        return dw.astype(w.dtype)
    leaves, structure = jax.tree.flatten(w)
    numbers = tuple(i for i, flag in enumerate(wanted) if flag is not None)
    pull_back = jax.vjp(derivative.decoding(w, numbers), *(leaves[i] for i in numbers))[1]
    found = dict.fromkeys(range(len(leaves))) | dict(zip(numbers, pull_back(dw), strict=True))
    return jax.tree.unflatten(structure, list(found.values()))


def _kept_rows(x: Rows) -> Rows:
    """What a gradient needs to know of its rows: all of unfinished ones, else shape and dtype."""
    return x if isinstance(x, Normed | Sums | Gated) else jnp.zeros((0, *x.shape), x.dtype)


def _rows_cotangent(kept: Rows, dx: jax.Array) -> Rows:
    """The cotangent of rows from that of their float32 values `[M, K]`."""
    if isinstance(kept, Normed | Sums | Gated):
        return jax.vjp(as_array, kept)[1](dx.reshape(kept.shape).astype(kept.dtype))[0]
    return dx.reshape(kept.shape if kept.size else kept.shape[1:]).astype(kept.dtype)
