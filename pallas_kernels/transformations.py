"""What `jax.vmap` and `jax.grad` do with a kernel: launch it again, or take its reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def batchable(
    kernel: Callable[..., Any], fold: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """`kernel` (of pytrees) with a rule for `jax.vmap`.

    `fold`: `(axis size, which leaves are batched, *arguments)` -> the batched result of one launch,
    or None where it takes several. Then, and without it, one launch follows another.
    """

    @jax.custom_batching.custom_vmap
    def run(*arguments):
        return kernel(*arguments)

    @run.def_vmap
    def _rule(axis_size, batched, *arguments):
        out = None if fold is None else fold(axis_size, batched, *arguments)
        if out is None:
            leaves, tree = jax.tree.flatten(arguments)
            which = jax.tree.leaves(batched)

            def one(some):
                some = iter(some)
                all_leaves = [next(some) if b else a for a, b in zip(leaves, which, strict=True)]
                return run(*jax.tree.unflatten(tree, all_leaves))

            out = lax.map(one, [a for a, b in zip(leaves, which, strict=True) if b])
        return out, jax.tree.map(lambda _: True, out)

    return run


def differentiable(
    kernel: Callable[..., Any], gradient: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """`kernel` (of pytrees) with a gradient.

    `gradient`: `(cotangent, *arguments)` -> a cotangent for each argument, None for no gradient.
    """

    @jax.custom_vjp
    def run(*arguments):
        return kernel(*arguments)

    run.defvjp(
        lambda *arguments: (run(*arguments), arguments),
        lambda arguments, cotangent: gradient(cotangent, *arguments),
    )
    return run
