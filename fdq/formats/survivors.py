"""The Viterbi algorithm over a bit-shift trellis, where errors move what later steps are near to.

Each overlap (see `fdq.formats.viterbi`) has a best path of its own so far, its *survivor*, and is
led on by the errors of that: per-survivor processing (Raheli, Polydoros and Tzou 1995).

Sequences lie along the first axis and steps of a state along the last, which is as fast for one
sequence as for many: with feedback from row to row there is one at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.viterbi import DEPTH, FAR
from pallas_kernels.typing import Array, Float, Int


def tail_biting_path(
    x: Float[Array, "steps v b"],
    levels: Float[Array, "states v"],
    bits: int,
    weights: Float[Array, "steps v b"],
    feedback: Float[Array, "b n n"],
    part: int,
) -> Int[Array, "steps b"]:
    """As `viterbi.tail_biting_path`, each part of the steps near to `x` and what errors add.

    Args:
      x: what the levels of the states should be near to, in squares.
      levels: of the states, `2^L` of them.
      bits: by which the window moves on in a step, b.
      weights: of the squares.
      feedback: `[i, j]` times the error `x - level` of value i is added to value j. Only that of
        earlier parts is used.
      part: steps, of which there are a whole number of parts.

    Returns:
      int32, below `2^bits`: the bits that leave the window in each step.
    """
    steps, values, lanes = x.shape
    overlaps, window = levels.shape[0] >> bits, levels.shape[0].bit_length() - 1
    levels = lax.optimization_barrier(levels)  # not a constant to XLA, which would compute with it
    x, roots = jnp.moveaxis(x, -1, 1), jnp.moveaxis(jnp.sqrt(weights), -1, 1)  # [steps, B, V]
    # The seam is that of the best path around it, of what is near to it and without feedback.
    near = min(steps // 2, -(-DEPTH * window // bits))
    around, its_roots = (jnp.concatenate([a[steps - near :], a[:near]]) for a in (x, roots))
    free = jnp.zeros((lanes, overlaps), jnp.float32)
    wanted = jnp.broadcast_to(around[..., None], (*around.shape, overlaps))
    last, _, chosen = _forward(free, wanted, its_roots, levels, bits)
    end = jnp.argmin(last, axis=1).astype(jnp.int32)[:, None]
    seam = _backward(end, chosen[near:], bits)[0]
    at = jnp.arange(overlaps, dtype=jnp.int32)[None] == seam
    costs = jnp.where(at, jnp.float32(0.0), jnp.float32(FAR))

    size = part * values
    parts = (jnp.arange(steps // part), *(a.reshape(-1, part, lanes, values) for a in (x, roots)))

    def one_part(state: tuple[jax.Array, jax.Array], given: tuple[jax.Array, ...]):
        costs, errors = state  # errors [B, overlaps, n] of the path to each
        i, x, roots = given
        into = lax.dynamic_slice_in_dim(feedback, i * size, size, axis=2)
        added = jnp.einsum("bon,bns->bos", errors, into, precision=lax.Precision.HIGHEST)
        added = jnp.moveaxis(added.reshape(lanes, overlaps, part, values), (2, 3), (0, 2))
        costs, began, chosen = _forward(costs, x[..., None] + added, roots, levels, bits)
        found = jnp.moveaxis(x, -1, 1)[..., None] - _survivors(chosen, levels, bits)
        found = jnp.moveaxis(found.reshape(size, lanes, overlaps), 0, -1)
        errors = jnp.take_along_axis(errors, began[..., None], axis=1, mode="promise_in_bounds")
        errors = lax.dynamic_update_slice_in_dim(errors, found, i * size, axis=2)
        return (costs, errors), chosen

    errors = jnp.zeros((lanes, overlaps, steps * values), jnp.float32)
    chosen = lax.scan(one_part, (costs, errors), parts)[1].reshape(steps, lanes, overlaps)
    return _backward(seam, chosen, bits)[1][..., 0]


def _forward(
    costs: jax.Array, wanted: jax.Array, roots: jax.Array, levels: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Costs `[B, overlaps]` at the end, where paths began, and the bits that left by step.

    `wanted` `[steps, B, V, overlaps]` is what paths from each overlap should be near to.
    """
    lanes, overlaps = costs.shape
    leaving, shared = 1 << bits, max(1, overlaps >> bits)
    # The next overlap is `high * shared + s` and the old one, whatever the high bits, the low bits
    # of `s * leaving + out`: along the last axis lie states of one source.
    by_leaving = levels.reshape(overlaps // shared, shared, leaving, -1)
    by_leaving = lax.optimization_barrier(jnp.transpose(by_leaving, (3, 2, 1, 0)))
    everyone = jnp.broadcast_to(jnp.arange(overlaps, dtype=jnp.int32), (lanes, overlaps))

    def step(state: tuple[jax.Array, jax.Array], given: tuple[jax.Array, jax.Array]):
        costs, began = state
        wanted, roots = given
        near = jnp.take_along_axis(wanted, began[:, None], axis=2, mode="promise_in_bounds")
        sources = jnp.concatenate([costs[:, None], near], axis=1)
        sources = lax.optimization_barrier(sources.reshape(*sources.shape[:2], shared, -1))

        def reached(out: int) -> jax.Array:
            source = sources[..., out % sources.shape[3], None]  # [B, 1 + V, shared, 1]
            total = source[:, 0]
            for v in range(wanted.shape[1]):
                difference = by_leaving[v, out][None] - source[:, 1 + v]
                total = total + jnp.square(difference * roots[:, v, None, None])
            return total

        best = reached(0)
        chosen = jnp.zeros(best.shape, jnp.int32)
        for out in range(1, leaving):
            other = reached(out)
            chosen = jnp.where(other < best, jnp.int32(out), chosen)
            best = jnp.minimum(best, other)
        # Their own loops: reordered in the same one, it is not vectorized.
        best, chosen = lax.optimization_barrier((best, chosen))
        best, chosen = (jnp.swapaxes(a, 1, 2).reshape(lanes, overlaps) for a in (best, chosen))
        old = ((everyone << jnp.int32(bits)) | chosen) & jnp.int32(overlaps - 1)
        began = jnp.take_along_axis(began, old, axis=1, mode="promise_in_bounds")
        return (best, began), chosen

    (costs, began), chosen = lax.scan(step, (costs, everyone), (wanted, roots))
    return costs, began, chosen


def _backward(end: jax.Array, chosen: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Overlaps `[B, m]` that paths to `end` began with; the bits that left, `[steps, B, m]`."""
    overlaps = chosen.shape[-1]

    def step(end: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = jnp.take_along_axis(chosen, end, axis=1, mode="promise_in_bounds")
        return ((end << jnp.int32(bits)) | out) & jnp.int32(overlaps - 1), out

    return lax.scan(step, end, chosen, reverse=True)


def _survivors(chosen: jax.Array, levels: jax.Array, bits: int) -> jax.Array:
    """Levels `[steps, V, B, overlaps]` of the best path to each overlap."""
    _, lanes, overlaps = chosen.shape
    everyone = jnp.broadcast_to(jnp.arange(overlaps, dtype=jnp.int32), (lanes, overlaps))

    def step(end: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = (end << jnp.int32(bits)) | jnp.take_along_axis(
            chosen, end, axis=1, mode="promise_in_bounds"
        )
        found = [level.at[states].get(mode="promise_in_bounds") for level in levels.T]
        return states & jnp.int32(overlaps - 1), jnp.stack(found)

    return lax.scan(step, everyone, chosen, reverse=True)[1]
