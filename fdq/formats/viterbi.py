"""The Viterbi algorithm over a bit-shift trellis: of all paths the one nearest to a sequence.

A state is a window of L bits over a stream that moves on by b bits a step, so that a state and the
next share L - b of them, their *overlap*. With `state = overlap | new << (L - b)` and
`state & (2^b - 1)` the bits that leave the window, the next overlap is `state >> b`. A step costs
one addition of a metric for each of the 2^L states, and the least of 2^b at each of the 2^(L - b)
overlaps (Forney 1973). Sequences lie along the last axis, so that a step is vectorized over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.typing import Array, Float, Int

FAR = 1e30  # the cost of an overlap that a path must not start from
DEPTH = 5  # windows, on each side of the seam, that choose the overlap there


def tail_biting_path(
    x: Float[Array, "steps v b"],
    levels: Float[Array, "states v"],
    bits: int,
    weights: Float[Array, "steps v b"] | None = None,
) -> Int[Array, "steps b"]:
    """The bits that leave the window in each step of a path that ends in the overlap it began with.

    The overlap is that of the best free path around the seam; the path is the best with it. So two
    passes come close to the best of all such paths. `jax.vmap` makes more lanes of its axis.

    Args:
      x: what the levels of the states should be near to, in squares.
      levels: of the states, `2^L` of them.
      bits: by which the window moves on in a step, b.
      weights: of the squares; all alike by default.

    Returns:
      int32, below `2^bits`. The stream is these bits, and its first `L - b` bits follow its last.
    """
    roots = () if weights is None else (jnp.sqrt(weights),)
    return _by_lanes(bits)(jnp.stack([x, *roots], axis=1), levels)


@functools.cache
def _by_lanes(bits: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`_tail_biting_path`, mapped by putting the sequences of all into one step."""
    path = jax.custom_batching.custom_vmap(functools.partial(_tail_biting_path, bits=bits))

    @path.def_vmap
    def _(size: int, batched: list[bool], x: jax.Array, levels: jax.Array):
        if batched[1] or not batched[0]:
            raise NotImplementedError("The levels of a trellis are those of all sequences.")
        steps, *kinds, lanes = x.shape[1:]
        together = jnp.moveaxis(x, 0, -2).reshape(steps, *kinds, size * lanes)
        out = path(together, levels).reshape(steps, size, lanes)
        return jnp.moveaxis(out, 1, 0), True

    return path


def _tail_biting_path(x: jax.Array, levels: jax.Array, bits: int) -> jax.Array:
    """Of `x` `[steps, 1 or 2, V, B]`: what levels should be near to, and the roots of weights."""
    steps, lanes = x.shape[0], x.shape[-1]
    # Not a constant to XLA, which would compute all that it can from one while it compiles.
    levels = lax.optimization_barrier(levels)
    overlaps, window = levels.shape[0] >> bits, levels.shape[0].bit_length() - 1
    # What is further from the seam than a few windows hardly matters to the choice there.
    near = min(steps // 2, -(-DEPTH * window // bits))
    around = jnp.concatenate([x[steps - near :], x[:near]])
    last, seen = _forward(jnp.zeros((overlaps, lanes), jnp.float32), around, levels, bits)
    end = jnp.argmin(last, axis=0).astype(jnp.int32)
    seam = _backward(end, seen[near:], around[near:], levels, bits)[0]
    at = jnp.arange(overlaps, dtype=jnp.int32)[:, None] == seam[None]
    start = jnp.where(at, jnp.float32(0.0), jnp.float32(FAR))
    _, seen = _forward(start, x, levels, bits)
    return _backward(seam, seen, x, levels, bits)[1]


def _forward(
    costs: jax.Array, x: jax.Array, levels: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """Costs `[overlaps, B]` at the end, and those before each step."""
    overlaps, leaving = costs.shape[0], 1 << bits
    # Of the next overlap's bits as many as fit are in the old one: its low ones.
    shared = max(1, overlaps >> bits)
    by_leaving = jnp.moveaxis(levels.reshape(overlaps, leaving, -1), 0, 1)  # [leaving, next, V]

    def step(costs: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        lanes = costs.shape[1]
        # The old overlap is the low bits of `next << b | leaving`.
        sources = costs.reshape(shared, -1, lanes)

        def reached(out: int) -> jax.Array:
            source = sources[:, out % sources.shape[1]]
            metric = _metric([level[:, None] for level in by_leaving[out].T], target)
            return source[None] + metric.reshape(-1, shared, lanes)

        best = reached(0)
        for out in range(1, leaving):
            best = jnp.minimum(best, reached(out))
        return best.reshape(overlaps, lanes), costs

    return lax.scan(step, costs, x)


def _backward(
    end: jax.Array, seen: jax.Array, x: jax.Array, levels: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """The overlap `[B]` that the best path to `end` began with; the bits that left, `[steps, B]`.

    The choice of a step is made anew, for the one overlap that the path is at.
    """
    overlaps = seen.shape[1]
    leaving = jnp.arange(1 << bits, dtype=jnp.int32)[:, None]

    def step(end: jax.Array, at) -> tuple[jax.Array, jax.Array]:
        costs, target = at
        states = (end << jnp.int32(bits))[None] | leaving  # [leaving, B]
        start = states & jnp.int32(overlaps - 1)
        cost = jnp.take_along_axis(costs, start, axis=0, mode="promise_in_bounds")
        candidates = [level.at[states].get(mode="promise_in_bounds") for level in levels.T]
        out = jnp.argmin(cost + _metric(candidates, target), axis=0).astype(jnp.int32)
        start = ((end << jnp.int32(bits)) | out) & jnp.int32(overlaps - 1)
        return start, out

    return lax.scan(step, end, (seen, x), reverse=True)


def _metric(levels: list[jax.Array], target: jax.Array) -> jax.Array:
    """Weighted squares `[states, B]` of a step; `levels` are V arrays `[states, 1 or B]`."""
    # A sum over axis V, written out: XLA's reduction of so short an axis is not vectorized.
    parts = []
    for v, level in enumerate(levels):
        difference = level - target[0, v][None]
        parts.append(jnp.square(difference * target[1, v][None] if len(target) > 1 else difference))
    return functools.reduce(jnp.add, parts)
