"""Results without a derivative: using one raises, in forward and in reverse mode alike.

A rule that raised when it is asked for tangents would also refuse the straight-through estimator,
which asks for them and drops them. So tangents are made by an operation that can be traced, and
left out, but neither computed nor transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, primal_dtype_to_tangent_dtype
from jax.interpreters import ad, batching, mlir


def without_derivative(function: Callable[..., Any], message: str) -> Callable[..., Any]:
    """`function` (of pytrees) such that using its derivative raises TypeError with `message`."""
    run: Any = jax.custom_jvp(function)

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def tangent(primals: Any, tangents: Any) -> Any:
        result = run(*primals)
        changes = [t for t in jax.tree.leaves(tangents, is_leaf=_is_zero) if not _is_zero(t)]

        def change(value: jax.Array) -> Any:
            dtype = primal_dtype_to_tangent_dtype(value.dtype)
            if dtype == jax.dtypes.float0:
                return np.zeros(value.shape, dtype)
            return _refused.bind(*changes, shape=value.shape, dtype=dtype, message=message)

        return result, jax.tree.map(change, result)

    return run


def _is_zero(tangent: Any) -> bool:
    no_float = getattr(tangent, "dtype", None) == jax.dtypes.float0
    return isinstance(tangent, SymbolicZero) or no_float


def _refuse(*_: Any, message: str, **__: Any) -> Any:
    raise TypeError(message)


def _batched(changes: Any, axes: Any, *, shape: tuple[int, ...], **settings: Any) -> Any:
    at = next(i for i, axis in enumerate(axes) if axis is not None)
    size = changes[at].shape[axes[at]]
    return _refused.bind(*changes, shape=(size, *shape), **settings), 0


_refused = Primitive("no_derivative")
_refused.def_impl(_refuse)
_refused.def_abstract_eval(lambda *_, shape, dtype, message: ShapedArray(shape, dtype))
ad.primitive_transposes[_refused] = _refuse
batching.primitive_batchers[_refused] = _batched
mlir.register_lowering(_refused, _refuse)
