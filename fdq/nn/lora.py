"""Low-rank adapters beside a linear layer (LoRA, arXiv 2106.09685), whatever its kernel is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.nn import general
from fdq.nn.experts import ExpertLinear
from fdq.nn.parameters import value
from fdq.ops.grouped_matmul.api import grouped_matmul
from fdq.ops.matmul.api import matmul
from fdq.ops.placement import in_auto_axes, spec_entries

WHOLE = "whole"
"""The name of an adapter of all columns of a layer."""


class LowRank(nnx.Module):
    """`(alpha / rank) * (x @ lora_a) @ lora_b`, for columns `[start, stop)` of a layer.

    Attributes:
      lora_a: `nnx.LoRAParam` of `[..., K, rank]`; leading axes are experts, or stacked layers.
      lora_b: `nnx.LoRAParam` of `[..., rank, stop - start]`.
      alpha: a number; the result is multiplied by `alpha / rank`.
    """

    def __init__(self, lora_a: Any, lora_b: Any, *, alpha: float, start: int = 0):
        self.lora_a: Any = nnx.data(nnx.LoRAParam(lora_a))
        self.lora_b: Any = nnx.data(nnx.LoRAParam(lora_b))
        self.alpha = float(alpha)
        self.start = start
        self.stop = start + lora_b.shape[-1]

    @property
    def rank(self) -> int:
        """Columns of `lora_a`."""
        return value(self.lora_a).shape[-1]

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    def __call__(self, rows: jax.Array, index: jax.Array | None = None) -> jax.Array:
        """Rows `[..., K]` -> `[..., stop - start]`, float32 or wider; experts have an `index`."""
        dtype = jnp.float64 if rows.dtype == jnp.float64 else jnp.float32
        a, b = (value(one).astype(dtype) for one in (self.lora_a, self.lora_b))
        rows = rows.astype(dtype)
        if index is None:
            y = matmul(matmul(rows, a), b)
        else:
            y = grouped_matmul(grouped_matmul(rows, a, index), b, index)
        return y * jnp.asarray(self.scale, dtype)

    def weight(self) -> jax.Array:
        """What it adds to the kernel: `[..., K, stop - start]` float32."""
        a, b = (value(one).astype(jnp.float32) for one in (self.lora_a, self.lora_b))
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * jnp.float32(self.scale)


class LoRA(nnx.Module):
    """A linear layer and adapters beside it: their results are added up.

    Attributes:
      base_module: the layer: `Linear`, `ExpertLinear`, `nnx.Linear`, `nnx.LinearGeneral`,
        `nnx.Einsum`, or what `fdq.quantize` made of one. Its kernel is not looked at.
      adapters: `LowRank`s by name: one for the whole layer (`whole`), or of a fused layer those of
        its parts, such as `q_proj` and `v_proj` of `qkv_proj`.
    """

    def __init__(self, base_module: Any, adapters: Mapping[str, LowRank]):
        self.base_module = base_module
        self.adapters = nnx.Dict(adapters)

    def in_order(self) -> list[LowRank]:
        """The adapters by their columns; NNX sorts them by their names."""
        return sorted(self.adapters.values(), key=lambda one: one.start)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """As the layer; the sum is formed in float32 and has the dtype of the layer's result."""
        base = self.base_module
        y = base(x, *args, **kwargs)
        with jax.named_scope("lora"):
            index = None
            if isinstance(base, ExpertLinear):
                index = args[0] if args else kwargs["expert_index"]
            rows = general.rows_of(base, x)
            changes = [one(rows, index) for one in self.in_order()]
            return in_auto_axes(self._sum, y, *changes, result=lambda: spec_entries(y))

    def _sum(self, y: jax.Array, *changes: jax.Array) -> jax.Array:
        change = general.result_of(self.base_module, self._joined(changes, y.shape[-1]))
        return (y.astype(change.dtype) + change).astype(y.dtype)

    def _joined(self, changes: Sequence[jax.Array], columns: int) -> jax.Array:
        """The changes of the adapters as those of all columns, with zeros where there is none."""
        if WHOLE in self.adapters:
            return changes[0]
        lead, parts, end = changes[0].shape[:-1], [], 0
        for one, change in zip(self.in_order(), changes, strict=True):
            parts += [jnp.zeros((*lead, one.start - end), change.dtype), change]
            end = one.stop
        return jnp.concatenate([*parts, jnp.zeros((*lead, columns - end), parts[-1].dtype)], -1)

    def weight(self, columns: int) -> jax.Array:
        """What the adapters add to the kernel `[..., K, columns]`, float32."""
        return self._joined([one.weight() for one in self.in_order()], columns)
