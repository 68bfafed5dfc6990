"""Quantized parameters in Flax Linen modules.

A Linen module looks its parameters up by name and shape, so it cannot hold a ``QTensor``: the
weights are decoded inside ``jax.jit``, where XLA frees each after its last use. Memory at rest is
that of the quantized parameters; the bandwidth of a step is that of the decoded ones, so decoding
one token is no faster than with the float parameters. For speed use an NNX module.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import QuantizedWeight, dequantize


def dequantize_tree(tree: Any, dtype: Any = jnp.float32) -> Any:
    """The tree with each QTensor decoded to ``dtype``; other leaves as they are."""

    def decoded(x: Any) -> Any:
        if isinstance(x, FoldedWeight):
            return x.dequantize(dtype)
        return dequantize(x, dtype) if isinstance(x, QuantizedWeight) else x

    is_leaf = (QuantizedWeight, FoldedWeight)
    return jax.tree.map(decoded, tree, is_leaf=lambda x: isinstance(x, is_leaf))


def apply(
    module: Any, qparams: Any, *args: Any, weight_dtype: Any = jnp.float32, **kwargs: Any
) -> Any:
    """``module.apply`` with quantized parameters, under ``jax.jit``.

    Args:
      module: a Linen module.
      qparams: its variables (``{"params": ..., ...}``) or its params alone, as ``fdq.quantize``
        returns them.
      *args: of the module's call; arrays are traced, everything else is static.
      weight_dtype: what quantized weights are decoded to.
      **kwargs: of ``module.apply``: ``method``, ``rngs``, ``mutable``, and of the call itself.

    Returns:
      What ``module.apply`` returns.

    Raises:
      TypeError: ``module`` is no Linen module, or ``qparams`` no mapping.

    Example:
      >>> qparams = fdq.quantize(params, "W4A16")  # doctest: +SKIP
      >>> y = fdq.linen.apply(module, qparams, x)  # doctest: +SKIP
    """
    if not isinstance(module, nn.Module):
        nnx_hint = " An NNX module needs no apply: fdq.quantize(module, ...) is called as it was."
        raise TypeError(
            "fdq.linen.apply(module, params, *args): expected a Linen module first, found "
            f"{type(module).__name__}.{nnx_hint if isinstance(module, nnx.Module) else ''}"
        )
    if not isinstance(qparams, Mapping):
        raise TypeError(
            "fdq.linen.apply(module, params, *args): expected the module's variables or params, "
            f"found {type(qparams).__name__}."
        )
    variables = qparams if "params" in qparams else {"params": qparams}
    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
    traced = [isinstance(x, (jax.Array, np.ndarray, np.generic)) for x in leaves]
    arrays = [x if t else None for x, t in zip(leaves, traced, strict=True)]
    static = tuple(None if t else x for x, t in zip(leaves, traced, strict=True))
    arguments = (module, treedef, static, np.dtype(weight_dtype), variables, arrays)
    try:
        hash(arguments[:4])
    except TypeError:  # A module with a list or dict among its fields: no cache key for jit.
        return _apply(*arguments)
    return _jitted(*arguments)


def _apply(module, treedef, static, weight_dtype, variables, arrays):
    leaves = [s if a is None else a for s, a in zip(static, arrays, strict=True)]
    args, kwargs = jax.tree_util.tree_unflatten(treedef, leaves)
    return module.apply(dequantize_tree(variables, weight_dtype), *args, **kwargs)


_jitted = jax.jit(_apply, static_argnums=(0, 1, 2, 3))
