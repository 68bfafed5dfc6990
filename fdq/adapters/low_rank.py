"""`fdq.lora`: a model with low-rank adapters beside its layers, which alone are trained."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import nn
from fdq.adapters.layers import Layer, chosen, layers_of
from fdq.nn.parameters import value
from fdq.quantizers.modules import substituted


def lora(
    model: Any,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Iterable[str] | None = None,
    dtype: Any = jnp.float32,
    key: jax.Array | None = None,
) -> Any:
    """A new model with low-rank adapters beside linear layers (LoRA, QLoRA); a pure function.

    A layer computes `y = layer(x) + alpha / rank * (x @ A) @ B`. A is random (uniform in
    `±1 / sqrt(K)`) and B zero, so the new model begins as the old one. Its weights, quantized or
    not, are shared with `model`, which is not changed. Only A and B are `nnx.LoRAParam`s:

        tuned = fdq.lora(model, rank=16, targets=("q_proj", "v_proj"))
        optimizer = nnx.Optimizer(tuned, optax.adamw(1e-4), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(tuned, optimizer, tokens):
            of_adapters = nnx.DiffState(0, nnx.LoRAParam)
            loss, gradient = nnx.value_and_grad(loss_of, argnums=of_adapters)(tuned, tokens)
            optimizer.update(tuned, gradient)
            return loss

    Gradients go through quantized products by decoding again, tile by tile or layer by layer: no
    copy of the weights in floats is kept. What decodes a model (`fdq.generate`, `fdq.prefill`,
    `fdq.functional`) takes one with adapters as well. `fdq.merge_lora` adds them to the weights,
    `fdq.save_lora` writes them as PEFT does.

    Args:
      model: an fdq model or any NNX module. Adapters fit beside `fdq.nn.Linear`, the experts of
        `fdq.nn.ExpertLinear` (each gets its own), `nnx.Linear` (subclasses too, and stacked by
        `nnx.scan` or `nnx.vmap`), `nnx.LinearGeneral` without batch axes, `nnx.Einsum` that is one
        matrix product, and what `fdq.quantize` makes of these.
      rank: columns of A, rows of B.
      alpha: see above; `rank` by default, so that the factor is 1.
      targets: names of layers as PEFT takes them (`"q_proj"`, `"mlp"`, `"layers.0.self_attn"`), or
        patterns of paths as in recipes (`"layers.{8..15}.*"`). The parts of fused layers have names
        of their own: `q_proj`, `k_proj`, `v_proj` of `qkv_proj`, `gate_proj` and `up_proj` of
        `gate_up_proj`; the name of the whole stands for all. By default all linear layers but a
        model's output head.
      dtype: of the adapters; their products are formed in float32 in any case.
      key: of A; `jax.random.key(0)` by default. What a layer gets depends on its path alone.

    Returns:
      The new model.

    Raises:
      ValueError: a target that no layer matches, a rank below 1, or a model that has adapters.
      TypeError: no NNX module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"lora: expected an NNX module, found a {type(model).__name__}. Params alone have no "
            "layers that an adapter could stand beside."
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank (={rank!r}) must be a whole number, 1 or more.")
    alpha = float(rank if alpha is None else alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha (={alpha}) must be a number.")
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        raise ValueError(f"dtype (={jnp.dtype(dtype)}) must be a float of 16 bits or more.")
    key = jax.random.key(0) if key is None else key
    adapters = {}
    pairs = chosen(model, plain_layers_of(model), targets)
    if not pairs:
        raise ValueError(f"lora: this {type(model).__name__} has no linear layer.")
    for layer, part in pairs:
        held = jax.tree.leaves(value(layer.module.kernel))[0]
        name = np.uint32(zlib.crc32(part.path.encode()))
        sizes = (*layer.shape[:-1], rank, part.stop - part.start, jnp.dtype(dtype))
        if isinstance(held, jax.ShapeDtypeStruct):
            a, b = jax.eval_shape(lambda key, s=sizes, n=name: _begin(key, n, s), key)
        else:
            a, b = _begin(key, name, sizes)
        adapters[part.path] = nn.LowRank(a, b, alpha=alpha, start=part.start)
    return with_adapters(model, adapters)


@functools.partial(jax.jit, static_argnums=2)
def _begin(key: jax.Array, name: Any, sizes: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """A and B of a new adapter, of `(..., K, rank, N)` and their dtype."""
    *lead, k, rank, n, dtype = sizes
    key = jax.random.fold_in(key, name)
    a = jax.random.uniform(key, (*lead, k, rank), jnp.float32, -(k**-0.5), k**-0.5)
    return a.astype(dtype), jnp.zeros((*lead, rank, n), dtype)


def plain_layers_of(model: Any) -> list[Layer]:
    """The linear layers of a model without adapters.

    Raises:
      ValueError: it has some already.
    """
    layers = layers_of(model)
    for layer in layers:
        if layer.adapters:
            raise ValueError(
                f"{layer.paths[0]}: has adapters already. Merge them first (fdq.merge_lora), or "
                "begin with the model that they were added to."
            )
    return layers


def with_adapters(model: Any, adapters: Mapping[str, nn.LowRank]) -> Any:
    """A copy of the model, which shares its arrays, with adapters by the paths of their parts.

    Raises:
      ValueError: it has adapters already.
    """
    if getattr(model, "placement", None) is not None:
        raise ValueError(
            "adapters: the model lies on a mesh, where layers are in parts. Take "
            "fdq.unshard(model), add adapters, and shard what comes of merging them."
        )
    copy = nnx.clone(model)
    stand_ins: dict[int, Any] = {}
    for layer in plain_layers_of(copy):
        own = {part.name: adapters[part.path] for part in layer.parts if part.path in adapters}
        if own:
            stand_ins[id(layer.module)] = nn.LoRA(layer.module, own)
    return substituted(copy, stand_ins)


def adapters_of(model: Any) -> dict[int, nn.LoRA]:
    """The layers of a model with adapters, by their `id`.

    Raises:
      ValueError: it has none.
    """
    modules = (one for _, one in nnx.iter_modules(model)) if isinstance(model, nnx.Module) else ()
    found = {id(one): one for one in modules if isinstance(one, nn.LoRA)}
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no adapters of fdq.lora (nnx.LoRA's are Flax's own)."
        )
    return found
