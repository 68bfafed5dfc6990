"""`grouped_matmul`: every row of x times the weight of the expert that was picked for it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fdq.formats.qtensor import QuantizedWeight
from fdq.ops.grouped_matmul.decoded import Decoded
from fdq.ops.grouped_matmul.derivative import changed_product, picked_product
from fdq.ops.grouped_matmul.mosaic_gpu import MosaicGpu
from fdq.ops.grouped_matmul.product import GroupedProduct
from fdq.ops.grouped_matmul.xla import Xla
from fdq.ops.implementation import Op
from fdq.ops.matmul import api as matmul
from fdq.ops.matmul import derivative
from fdq.ops.matmul.product import Product, parse_activation
from fdq.ops.matmul.wide_rows import in_float32
from fdq.ops.placement import in_auto_axes, leading_axes, mesh_of, spec_entry
from fdq.ops.rows import Sums, as_array
from fdq.ops.transposing import is_traced, transposable
from fdq.schemes.scheme import ActivationSpec
from pallas_kernels.typing import Array, Float, Shaped

GROUPED_MATMUL: Op[GroupedProduct] = Op("grouped_matmul", MosaicGpu(), Decoded(), Xla())


def grouped_matmul(
    x: Shaped[Array, "t k"],
    w: QuantizedWeight | Float[Array, "e k n"],
    expert_index: Any,
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
    without rows never, and no row is dropped. GPUs decode each expert that has rows once, and
    multiply all of them in one batched product, or a few where some were picked much more often.

    Args:
      x: `[T, K]`.
      w: `[E, K, N]`, an array, a QTensor or a prepared weight.
      expert_index: integers `[T]`, or `[T, picks]` for several experts a row; each in `0 .. E - 1`.
      activation: as in `matmul`.
      activation_scale: one scale for all experts, or `[E]`.
      implementation: as in `matmul`.
      out_dtype: as in `matmul`.
      path: as in `matmul`.

    Returns:
      `[T, N]`, or `[T, picks, N]`. Derivatives, forward and reverse, are those of the decoded
      weights, as in `matmul`.

    Raises:
      ValueError: shapes that do not match, or an expert that there is not; the latter only where
        values are known, not under `jax.jit`.
      TypeError: `expert_index` holds no integers; and as `matmul`.
    """
    settings = {"dtype": out_dtype, "path": path}
    spec = parse_activation(activation)
    arguments = GroupedProduct(x, w, spec, activation_scale, index=expert_index, **settings)
    _check_experts(arguments)
    return grouped_product(arguments, implementation=implementation)[0].value()


def _check_experts(a: GroupedProduct) -> None:
    """ValueError for an index that no expert has, as far as values are known."""
    if is_traced(a.index) or not a.index.is_fully_addressable or not a.index.size:
        return
    found, experts = jax.device_get(a.index), a.w.shape[0]
    if found.min() < 0 or found.max() >= experts:
        raise ValueError(
            f"{a.path}: expert_index ranges over {found.min()} ... {found.max()}, expected "
            f"0 ... {experts - 1}."
        )


def grouped_product(
    arguments: GroupedProduct, weights: jax.Array | None = None, implementation: str | None = None
) -> tuple[Sums, Sums | None]:
    """The product, and the one beside it, their sums left to whoever reads them.

    With `weights`, float32 `[T, picks]`, the picks of a row are added up: `[T, N]`.
    """
    a = _in_order_of_codes(arguments)
    beside = a.beside
    run: Any = GROUPED_MATMUL.choose(a, implementation)
    joined = beside is not None and run.joins(a)
    other = (beside.x, beside.w) if beside is not None and joined else None
    mesh, axes = leading_axes(a.w, a.axes)
    call = functools.partial(_parts, run, a.activation, a.picks, a.path, False)
    if axes:
        call = functools.partial(_of_shards, mesh, axes, (run, a.activation, a.picks, a.path))
    arrays = (a.x, a.w, a.index, a.activation_scale, other)
    with jax.named_scope("grouped_matmul"):
        found = in_auto_axes(call, *arrays, result=lambda: _axes(a))
    parts, more = found if joined else (found, None)
    sums = Sums(parts, dtype=a.dtype)
    if a.bias is not None:
        arrays = (sums, a.bias, a.index)
        sums = Sums.of(in_auto_axes(_biased, *arrays, result=lambda: _axes(a)[1:]))
    if weights is not None:
        sums = Sums.of(run.combine(sums, weights))
    if beside is None:
        return sums, None
    return sums, Sums(more, beside.bias, beside.dtype) if joined else matmul.product(beside)


def _in_order_of_codes(a: GroupedProduct) -> GroupedProduct:
    """As of `matmul`; each pick has its own order, and so its own rows of x."""
    if a.beside is not None:
        a = dataclasses.replace(a, beside=matmul.in_order_of_codes(a.beside))
    w, order = a.w.without_order() if a.quantized else (a.w, None)
    if order is None:
        return a

    def gathered(x: jax.Array, order: jax.Array, index: jax.Array) -> jax.Array:
        rows = _row_a_pick(x, a.picks)
        rows = jnp.take_along_axis(rows, order[index.reshape(-1)], axis=-1, mode="clip")
        return rows.reshape(*index.shape, -1)

    x = as_array(a.x)
    with mesh_of(x, order):
        x = in_auto_axes(gathered, x, order, a.index, result=lambda: [*_axes(a)[1:-1], None])
    return dataclasses.replace(a, x=x, w=w)


def _biased(sums: Sums, bias: jax.Array, index: jax.Array) -> jax.Array:
    """The sums, rounded, and each with the bias of its expert, as a `Product` has it."""
    return sums.value() + bias.astype(sums.dtype)[index]


def _axes(a: GroupedProduct) -> list[Any]:
    rows, columns = matmul.row_axes(a.x), spec_entry(jax.tree.leaves(a.w)[0], -1)
    return [None, *rows, *[None] * (a.index.ndim - len(rows)), columns]


def _of_shards(mesh, axes, settings, x, w, index, activation_scale, beside):
    """Each device multiplies the rows of its own experts; what it has is added up over `axes`.

    Left to itself, XLA would gather the codes of all experts at each step.
    """
    experts = w.shape[0]
    each = False
    if activation_scale is not None and activation_scale.size == experts > 1:
        each, activation_scale = True, activation_scale.reshape(-1)

    def of_shard(x, w, index, activation_scale):
        own = w.shape[0]
        local = index - lax.axis_index(axes).astype(jnp.int32) * own
        mine = (local >= 0) & (local < own)
        local = jnp.where(mine, local, own)
        parts = _parts(*settings, True, x, w, local, activation_scale, None)
        return lax.psum(jnp.where(mine[..., None], parts, 0.0), axes)

    sharded, whole = PartitionSpec(axes), PartitionSpec()
    run = jax.shard_map(
        of_shard,
        mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=(whole, sharded, whole, sharded if each else whole),
        out_specs=whole,
        axis_names=set(axes),
        check_vma=False,
    )
    return run(x, w, index, activation_scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3, 4))
def _parts(run, activation, picks, path, shard, x, w, index, activation_scale, beside):
    def program(x, w, scale, index):
        other = None if beside is None else Product(*beside)
        settings = {"index": index, "beside": other, "path": path, "shard": shard}
        return run(GroupedProduct(x, w, activation, scale, **settings))

    def meaning(x, w, scale, index):
        like = jax.eval_shape(program, x, w, scale, index)
        rows = picked_product(_row_a_pick(as_array(x), picks), w, index.reshape(-1))
        return derivative.as_parts(like, [rows])

    if beside is not None:  # two products
        return program(x, w, activation_scale, index)
    if x.dtype == jnp.float64 and isinstance(w, QuantizedWeight):
        program = in_float32(program, activation)
    if not is_traced(x, w, activation_scale, index):
        return program(x, w, activation_scale, index)
    return transposable(program, meaning, x, w, activation_scale, index)


def _tangent(run, activation, picks, path, shard, primals, tangents):
    x, w, index, scale, beside = primals
    dx, dw, _, dscale, dbeside = tangents
    found = _parts(run, activation, picks, path, shard, *primals)
    moving = derivative.moving(dw)
    derivative.check(w, bool(moving), bool(derivative.moving(dscale)), path)
    picked, terms = index.reshape(-1), []
    if derivative.moving(dx):
        terms.append(picked_product(_row_a_pick(derivative.row_change(x, dx), picks), w, picked))
    if moving:
        rows = as_array(x)
        if isinstance(w, QuantizedWeight):
            rows = derivative.multiplied_rows(rows, activation, scale, path)
        terms.append(changed_product(_row_a_pick(rows, picks), w, picked, moving))
    if beside is None:
        return found, derivative.as_parts(found, terms)
    (rows, other), (drows, dother) = beside, dbeside
    moving, more = derivative.moving(dother), []
    derivative.check(other, bool(moving), False, path)
    if derivative.moving(drows):
        more.append(derivative.decoded_product(derivative.row_change(rows, drows), other))
    if moving:
        more.append(derivative.changed_product(as_array(rows), other, moving))
    return found, (derivative.as_parts(found[0], terms), derivative.as_parts(found[1], more))


_parts.defjvp(_tangent, symbolic_zeros=True)


def _row_a_pick(rows: jax.Array, picks: int) -> jax.Array:
    rows = rows.reshape(-1, rows.shape[-1])
    return jnp.repeat(rows, picks, axis=0, total_repeat_length=picks * rows.shape[0])
