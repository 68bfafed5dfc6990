"""The experts of a mixture-of-experts layer: one kernel for all of them, one picked per row."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.nn.handing_on import reads_rows, sums_of, takes_rows
from fdq.nn.linear import initial_kernel
from fdq.nn.parameters import value
from fdq.ops.gates import Gate, swiglu
from fdq.ops.grouped_matmul.api import grouped_product
from fdq.ops.grouped_matmul.product import GroupedProduct, combined
from fdq.ops.matmul.product import Product
from fdq.ops.rows import Gated, Rows, Sums, as_array
from fdq.schemes.scheme import ActivationSpec


class ExpertLinear(nnx.Module):
    """`y[t] = x[t] @ kernel[e] + bias[e]` with `e = expert_index[t]` and `kernel [E, K, N]`.

    Attributes:
      kernel: `nnx.Param` of `[E, K, N]`, or a quantized weight that stands for it.
      bias: `nnx.Param` of `[E, N]`, or None.
      activation, activation_scale: as in `Linear`; one scale serves all experts.
      observer: called with `x` as an array, a row a pick, the picked experts and what their outputs
        are multiplied by, or None; its `output` with the result and the experts. For calibration.
      expert_axes: names of the mesh axes over which experts are sharded, with commas; `split` notes
        them, as tracers do not say it where axes are Auto.
      shard: whether these are the experts of one device (`fdq.sharding`): of rows whose index is E
        nothing is computed.
      out_dtype: of the result; None is that of `x`.
    """

    shard: bool = False
    out_dtype: Any = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (num_experts, in_features, out_features)
        self.kernel: Any = nnx.data(initial_kernel(rngs, shape, dtype))
        bias = nnx.Param(jnp.zeros((num_experts, out_features), dtype)) if use_bias else None
        self.bias: Any = nnx.data(bias)
        self.activation: ActivationSpec | None = None
        self.activation_scale: Any = nnx.data(None)
        self.observer: Any = nnx.data(None)
        self.expert_axes = ""

    @takes_rows
    def __call__(self, x: Rows, expert_index: jax.Array) -> jax.Array:
        """`x [T, K]`, `expert_index [T] int32 -> [T, N]` in the dtype of `x`."""
        if self.observer is not None:
            return self.observed(x, expert_index, None).value()
        return grouped_product(self.arguments(x, expert_index))[0].value()

    def arguments(
        self, x: Rows, expert_index: jax.Array, beside: Product | None = None
    ) -> GroupedProduct:
        """Of the op that computes the layer, with another product `beside` it."""
        w, scale, bias = value(self.kernel), value(self.activation_scale), value(self.bias)
        return GroupedProduct(
            x,
            w,
            self.activation,
            scale,
            bias,
            index=expert_index,
            beside=beside,
            dtype=self.out_dtype or x.dtype,
            shard=self.shard,
            axes=tuple(self.expert_axes.split(",")) if self.expert_axes else (),
        )

    def observed(self, x: Rows, expert_index: jax.Array, gates: jax.Array | None) -> Sums:
        """The product, shown to the observer; `gates` are what outputs are multiplied by."""
        arguments = self.arguments(x, expert_index)
        index, gates = arguments.index, None if gates is None else gates.reshape(-1)
        self.observer(_row_a_pick(x, index), index.reshape(-1), gates)
        return Sums.of(self.observer.output(grouped_product(arguments)[0].value(), index))


@dataclasses.dataclass(frozen=True)
class ExpertShard:
    """What one device has of a layer's experts, in `jax.shard_map`: some of them, or some channels.

    Attributes:
      experts: mesh axes over which whole experts are dealt out.
      channels: those over which the channels of each are cut.
      shared: those over which the channels of shared experts are.
    """

    experts: tuple[str, ...]
    channels: tuple[str, ...]
    shared: tuple[str, ...]

    def own(self, index: jax.Array, weights: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Experts as this device numbers its `count`, that number for those of others, weight 0."""
        if not self.experts:
            return index, weights
        index = index - jax.lax.axis_index(self.experts).astype(jnp.int32) * count
        mine = (index >= 0) & (index < count)
        return jnp.where(mine, index, count), jnp.where(mine, weights, jnp.zeros_like(weights))

    def total(self, routed: Sums, shared: Sums | None) -> jax.Array:
        """The sum over all devices, float32; what several devices have alike counts once."""
        have = (*self.experts, *self.channels)
        axes = tuple(dict.fromkeys((*have, *self.shared)))
        y = _once(_float32(routed), [name for name in axes if name not in have])
        if shared is not None:
            z = dataclasses.replace(shared, bias=None)
            y = y + _once(_float32(z), [name for name in axes if name not in self.shared])
        y = jax.lax.psum(y, axes)
        bias = None if shared is None else shared.bias
        return y if bias is None else y + bias.astype(jnp.float32).reshape(1, -1)


def _float32(sums: Sums) -> jax.Array:
    return dataclasses.replace(sums, dtype=jnp.float32).value()


def _once(y: jax.Array, axes: list[str]) -> jax.Array:
    """`y` on the first device along these axes, and zeros on the others."""
    for name in axes:
        y = jnp.where(jax.lax.axis_index(name) == 0, y, jnp.zeros_like(y))
    return y


class Experts(nnx.Module):
    """Gated experts: `gate_up_proj [E, H, 2 I]` (gate first) and `down_proj [E, I, H]`.

    `part` is what one device has of them, in a shard of a model (`fdq.sharding`).
    """

    part: ExpertShard | None = None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        use_bias: bool = False,
        gate: Gate = swiglu,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        settings: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.gate_up_proj = ExpertLinear(
            num_experts, hidden_size, 2 * intermediate_size, **settings
        )
        self.down_proj = ExpertLinear(num_experts, intermediate_size, hidden_size, **settings)
        self.gate = gate

    @takes_rows
    def __call__(
        self, x: Rows, experts: jax.Array, weights: jax.Array, shared: Any = None
    ) -> jax.Array:
        """Sum over the chosen experts of weight times output, and the output of shared ones.

        `x [T, H]`, `experts [T, top_k]` int32 and `weights [T, top_k]` float32 -> `[T, H]` in the
        dtype of `x`, summed in float32. The products of `shared`, an `MLP` or None, come along.
        """
        part, dtype = self.part, x.dtype
        if part is not None:
            count = value(self.down_proj.kernel).shape[0]
            experts, weights = part.own(experts, weights, count)
        up = down = None
        if shared is not None:
            up, down = shared.gate_up_proj, shared.down_proj
        with jax.named_scope("gate_up_proj"):
            picked, beside = _products(self.gate_up_proj, x, experts, up, x, weights, False)
        rows = None if shared is None or beside is None else Gated(beside, shared.gate)
        with jax.named_scope("down_proj"):
            gated = Gated(picked, self.gate)
            y, z = _products(self.down_proj, gated, experts, down, rows, weights, True)
            if part is not None:
                return part.total(y, z).astype(dtype)
            return y.value() if z is None else y.value() + z.value()


def _products(
    layer: Any,
    x: Rows,
    index: jax.Array,
    shared: Any,
    rows: Any,
    gates: jax.Array,
    combines: bool,
) -> tuple[Sums, Sums | None]:
    """`layer(x, index)` and `shared(rows)`, together where both are fdq's own.

    x is `[T, K]` or `[T, top_k, K]`; where it `combines`, the picks of a row are added up, times
    their `gates` `[T, top_k]`.
    """
    weights = gates if combines else None
    observed = reads_rows(layer) and getattr(layer, "observer", None) is not None
    if observed or not reads_rows(layer):
        if observed:
            sums = layer.observed(x, index, gates)
        else:
            y = layer(_row_a_pick(x, index), index.reshape(-1))
            sums = Sums.of(y.reshape(*index.shape, y.shape[-1]))
        if weights is not None:
            sums = Sums.of(combined(sums, weights))
        return sums, None if shared is None else sums_of(shared, rows)
    if shared is None or reads_rows(shared):
        beside = None if shared is None else shared.arguments(rows)
        return grouped_product(layer.arguments(x, index, beside), weights)
    return grouped_product(layer.arguments(x, index), weights)[0], sums_of(shared, rows)


def _row_a_pick(x: Rows, index: jax.Array) -> jax.Array:
    """Rows `[T, K]` or `[T, top_k, K]` as an array `[P, K]`, one for each of `index`."""
    rows = as_array(x).reshape(-1, x.shape[-1])
    picks = index.size // rows.shape[0]
    if picks == 1:
        return rows
    return jnp.repeat(rows, picks, axis=0, total_repeat_length=index.size)
