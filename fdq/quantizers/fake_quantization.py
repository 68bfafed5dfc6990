"""`fdq.fake_quant`: weights as they are after quantization, for training through the rounding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.formats.folded import FoldedWeight
from fdq.formats.qtensor import dequantize
from fdq.nn.parameters import value
from fdq.quantizers import modules
from fdq.quantizers.assigned import Assigned
from fdq.quantizers.layer_inputs import LayerInputs
from fdq.quantizers.quantization import quantize
from fdq.schemes import assignment
from fdq.schemes.assignment import Row
from fdq.schemes.fold import PLAIN, Fold


def fake_quant(
    target: Any,
    scheme: Any,
    *,
    method: str | None = None,
    compat: str | None = None,
    rules: Any = None,
) -> Any:
    """What `fdq.quantize` makes of weights, decoded again; derivatives go straight through.

    Values are those of `dequantize(quantize(w, scheme))`, of the shape and dtype of w. Derivatives,
    forward and reverse, are those of w itself (straight-through estimator, arXiv 1308.3432), so
    that floats are trained towards weights that survive the rounding (QAT), with any optimizer:

        def loss(params, batch):
            return loss_of(module.apply(fdq.fake_quant(params, "W4A16", method="absmax"), batch))

        params = ...                               # after training
        params = fdq.quantize(params, "W4A16", method="absmax")

    Of formats of 4 bits and fewer the default method searches for scales, at each step; `"absmax"`
    costs next to nothing. Use the same method in training and in the end.

    Args:
      target: as in `fdq.quantize`: an array `[..., K, N]`, a tree of parameters, or an NNX module,
        of which a new one is returned.
      scheme: as in `fdq.quantize`. Formats of activations and of the cache do not count: inputs of
        layers are left as they are.
      method: as in `fdq.quantize`.
      compat: as in `fdq.quantize`.
      rules: as in `fdq.quantize`.

    Raises:
      ValueError: what `fdq.quantize` refuses. Inside `jax.jit` values are not known: a weight with
        NaN or infinity becomes NaN.
      TypeError: no array, tree or module.

    Examples:
      >>> w = jnp.linspace(-1.0, 1.0, 256).reshape(128, 2)
      >>> jax.grad(lambda w: fdq.fake_quant(w, "W2A16").sum())(w).sum()
      Array(256., dtype=float32)
    """
    if hasattr(target, "shape") and hasattr(target, "dtype"):
        once = functools.partial(quantize, scheme=scheme, method=method, compat=compat, rules=rules)
        return _straight_through(lambda w: dequantize(once(w), w.dtype), target)
    assigned = Assigned.of(target, scheme, compat=compat, rules=rules, method=method)
    assigned.table.report(verbose=False)
    inputs = LayerInputs.of(assigned.leaves)
    if assigned.tensors is None:
        return _of_tree(assigned, inputs)
    for tensor, row in zip(assigned.tensors, assigned.table.rows, strict=True):
        if row.scheme is not None:
            role = modules.role_of(tensor.uses[0])
            assert isinstance(role, modules.Role)
            _replace(tensor, _rounded(value(tensor.content), row, role.fold, assigned, inputs))
    return assigned.target


def _of_tree(assigned: Assigned, inputs: LayerInputs) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten(assigned.target, is_leaf=assignment.is_leaf)
    for i, (leaf, row) in enumerate(zip(leaves, assigned.table.rows, strict=True)):
        if row.scheme is not None:
            plain = dataclasses.replace(row, fold=None)
            new = _rounded(value(leaf), plain, row.fold or PLAIN, assigned, inputs)
            leaves[i] = leaf.replace(new) if isinstance(leaf, nnx.Variable) else new
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _rounded(array: Any, row: Row, fold: Fold, assigned: Assigned, inputs: LayerInputs) -> Any:
    """One tensor as its row says, of its own shape and dtype."""

    def once(w: Any) -> Any:
        q = assigned.tensor(fold(w), row, [row.path], inputs=inputs)
        sizes = tuple(w.shape[w.ndim - len(fold.order) :])
        return FoldedWeight(q, fold, sizes).dequantize(w.dtype)

    return _straight_through(once, array)


def _straight_through(rounded: Callable[[Any], Any], w: Any) -> Any:
    """`rounded(w)` with the derivative of w."""
    if isinstance(w, jax.ShapeDtypeStruct):
        return rounded(w)
    run = jax.custom_jvp(rounded)
    run.defjvp(lambda primals, tangents: (run(*primals), *tangents))
    return run(jnp.asarray(w))


def _replace(tensor: modules.Tensor, array: Any) -> None:
    """Puts an array in the place of a module's tensor, wherever it is used."""
    if isinstance(tensor.content, nnx.Variable):
        tensor.content.set_value(array)
        return
    for use in tensor.uses:
        if isinstance(use.owner, dict):
            use.owner[use.attribute] = array
        else:
            setattr(use.owner, use.attribute, array)
