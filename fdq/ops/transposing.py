"""Programs of linear functions that `jax.linear_transpose` cannot take word by word.

They round, or loop until a condition, and custom derivatives say nothing of transposes: inside of
`jax.jit` nothing but an operation of JAX's own kind carries a transpose along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

Function = Callable[..., jax.Array]


def is_traced(*trees: Any) -> bool:
    """Whether JAX is tracing, or transforming, a function of these arrays."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def transposable(program: Function, meaning: Function, x: Any, *others: Any) -> jax.Array:
    """`program(x, *others)`, whose transpose with respect to x is that of `meaning`.

    Both are functions of the same pytrees with the same result up to rounding, linear in x. Where
    the program has side effects, as kernels have in the interpreter, it stays as it is, without a
    transpose.
    """
    leaves, structure = jax.tree.flatten((x, *others))
    traced: Any = jax.make_jaxpr(lambda *leaves: program(*jax.tree.unflatten(structure, leaves)))

    def flat_meaning(*leaves: jax.Array) -> jax.Array:
        return meaning(*jax.tree.unflatten(structure, leaves))

    jaxpr, linear = traced(*leaves), len(jax.tree.leaves(x))
    if jaxpr.effects:
        return jaxpr_as_fun(jaxpr)(*leaves)[0]
    return _transposable.bind(*leaves, jaxpr=jaxpr, meaning=flat_meaning, linear=linear)


def _run(*leaves: Any, jaxpr: Any, meaning: Function, linear: int) -> jax.Array:
    del meaning, linear
    return jaxpr_as_fun(jaxpr)(*leaves)[0]


def _transposed(cotangent: Any, *leaves: Any, jaxpr: Any, meaning: Function, linear: int) -> Any:
    del jaxpr
    x, others = leaves[:linear], leaves[linear:]
    if any(map(ad.is_undefined_primal, others)) or not all(map(ad.is_undefined_primal, x)):
        raise NotImplementedError(
            "A product with a quantized weight is transposed with respect to its rows only, all of "
            "which are arguments of the transposed function."
        )
    back = jax.linear_transpose(lambda *x: meaning(*x, *others), *(leaf.aval for leaf in x))
    return [*back(ad.instantiate_zeros(cotangent)), *[None] * len(others)]


def _batched(leaves: Any, axes: Any, *, jaxpr: Any, meaning: Function, linear: int) -> Any:
    axes = tuple(axes)
    batched = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(jaxpr), in_axes=axes))(*leaves)
    meaning = jax.vmap(meaning, in_axes=axes)
    return _transposable.bind(*leaves, jaxpr=batched, meaning=meaning, linear=linear), 0


class _Transposable(Primitive):
    def is_high(self, *_: Any, **__: Any) -> bool:
        return False  # what JAX has to rewrite in the program, it rewrites as that is lowered


_transposable = _Transposable("transposable")
_transposable.def_impl(_run)
_transposable.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals[0])
ad.primitive_transposes[_transposable] = _transposed
batching.primitive_batchers[_transposable] = _batched
mlir.register_lowering(_transposable, mlir.lower_fun(_run, multiple_results=False))
