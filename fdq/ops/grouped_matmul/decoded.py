"""Experts for many rows on GPUs: those that were hit are decoded once, and multiplied in batches.

Rows are sorted by expert, and each expert has as many places in a batch as twice its even share:
one batched product multiplies them all. Where an expert was picked more often than that, there is
another round, so that no row is dropped and no step waits for a single expert.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats.qtensor import QuantizedWeight
from fdq.ops.choice import trace_target, traced_for
from fdq.ops.grouped_matmul.product import (
    GroupedImplementation,
    GroupedProduct,
    quantized_rows,
    scale_each,
)
from fdq.ops.kernels import Kernel
from fdq.ops.matmul.decoded import KERNEL, decoded_operand, self_check_of
from fdq.ops.matmul.mosaic_gpu import preferred, unprepared
from fdq.ops.matmul.xla import compute_dtype
from fdq.ops.placement import sharded
from fdq.ops.prepared_weight import WordsWeight, kernel_weight
from fdq.ops.rows import as_array, flattened
from pallas_kernels.device import MOST_ROWS

if TYPE_CHECKING:
    from pallas_kernels.weights.kernel_weight import KernelWeight

_MOST_DECODED = 2**30
"""Bytes of experts that are decoded at once."""

_SMALLEST_SHARE = 16  # rows of an expert in a round: tensor cores multiply no fewer


class Decoded(Kernel[GroupedProduct], GroupedImplementation):
    """A decoding kernel and a batched product for each gigabyte of decoded experts."""

    name = "decoded"

    def unsupported(self, arguments: GroupedProduct) -> str | None:
        """Arrays, weights that no kernel reads, scales for each expert, and sharded arrays."""
        a = arguments
        if not isinstance(a.w, QuantizedWeight):
            return "the weight is an array: there is nothing to decode"
        if not isinstance(a.index.size, int) or not a.index.size:
            return f"a known number of rows is decoded for, found {a.index.size}"
        if reason := scale_each(a):
            return reason
        return WordsWeight.unsupported(a.w) or sharded(a.x, a.w)

    def declined(self, arguments: GroupedProduct) -> str | None:
        """Few rows, canonical weights, what is slower than XLA, and what is wrong here."""
        a = arguments
        if a.tokens <= MOST_ROWS:
            return f"{a.tokens} rows are few: XLA decodes as it multiplies"
        return unprepared(a.w) or preferred(KERNEL, a.w, a.tokens, self_check_of(a.w.spec))

    def __call__(self, arguments: GroupedProduct) -> jax.Array:
        """One part, float32 `[1, *index.shape, N]`."""
        a, index, scale = arguments, arguments.index.reshape(-1), None
        if a.activation is None:
            rows = flattened(as_array(a.x))
        else:
            rows, scale = quantized_rows(a, compute_dtype(a.x.dtype, trace_target()))
        y = _by_expert(rows, kernel_weight(a.w), index, a.picks, traced_for())
        y = y if scale is None else y * scale
        return y.reshape(1, *a.index.shape, y.shape[-1])


def share(picks: int, experts: int) -> int:
    """Rows of an expert in a round: twice what it has if all have as many, in sixteens."""
    even = -(-2 * picks // experts)
    return min(-(-even // _SMALLEST_SHARE) * _SMALLEST_SHARE, max(picks, 1))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _by_expert(x: jax.Array, w: KernelWeight, index: jax.Array, picks: int, _: Hashable):
    """Rows `[P / picks, K]` times the experts `[P]` of their picks -> float32 `[P, N]`."""
    layout, experts, p = w.layout, w.words.shape[0], index.shape[0]
    dtype, exponent = jnp.dtype(compute_dtype(x.dtype, trace_target())), None
    if dtype == jnp.float16 and x.dtype != jnp.float16:  # as in a dense product
        x = x.astype(jnp.float32)
        exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=-1, keepdims=True))[1]
        x = jnp.ldexp(x, -exponent)
    x = x.astype(dtype)
    missing = layout.segments * layout.segment - x.shape[-1]
    x = jnp.pad(x, [(0, 0), (0, missing)]) if missing else x
    # Experts that there are not, of other devices, come last and count for none.
    order = jnp.argsort(index, stable=True)
    counts = jnp.sum(index[:, None] == jnp.arange(experts, dtype=jnp.int32)[None], axis=0)
    counts = counts.astype(jnp.int32)
    ends = jnp.cumsum(counts)
    firsts = ends - counts
    known = jnp.minimum(index, experts - 1)
    # A pick's place among those of its expert.
    place = jnp.zeros((p,), jnp.int32)
    place = place.at[order].set(jnp.arange(p, dtype=jnp.int32), unique_indices=True)
    place = place - firsts[known]
    size = share(p, experts)
    y = jnp.zeros((p, layout.n), jnp.float32)
    for first, count in _cuts(experts, x.shape[-1] * layout.padded_n * dtype.itemsize):
        own = slice(first, first + count)
        # After the cut before it, so that no two are in memory.
        decoded, after = decoded_operand(
            w, dtype, y if first else x, counts=counts, experts=(first, count)
        )
        y = _rounds(
            x, decoded, after if after is None or after.shape[0] == 1 else after[own], counts[own],
            firsts[own], order, index - first, place, size, picks, y,
        )  # fmt: skip
    if exponent is not None:
        y = jnp.ldexp(y, jnp.repeat(exponent, picks, axis=0, total_repeat_length=p))
    return y


def _cuts(experts: int, bytes_each: int) -> list[tuple[int, int]]:
    """First and number of the experts that are decoded at a time."""
    most = max(1, _MOST_DECODED // bytes_each)
    parts = -(-experts // most)
    step = -(-experts // parts)
    return [(first, min(step, experts - first)) for first in range(0, experts, step)]


def _rounds(x, decoded, after, counts, firsts, order, expert, place, size, picks, y) -> jax.Array:
    """`y` with the rows of these experts, so many of each at a time; the last may have none."""
    count = decoded.shape[0]
    seat = jnp.arange(size, dtype=jnp.int32)[None]
    batched = (((2,), (1,)), ((0,), (0,)))
    wide = decoded.dtype == jnp.float32

    def one_round(state):
        i, y = state
        sources = jnp.minimum(firsts[:, None] + i * size + seat, order.shape[0] - 1)
        rows = x[order[sources.reshape(-1)] // picks].reshape(count, size, -1)
        found = lax.dot_general(
            rows,
            decoded,
            batched,
            precision=lax.Precision.HIGHEST if wide else None,
            preferred_element_type=jnp.float32,
        )
        found = found if after is None else found * after
        found = found.reshape(count * size, -1)[:, : y.shape[-1]]
        here = place - i * size
        mine = (here >= 0) & (here < size) & (expert >= 0) & (expert < count)
        at = jnp.where(mine, expert * size + here, 0)
        return i + 1, jnp.where(mine[:, None], found[at], y)

    # The first round is no step of a loop: mostly it is the only one.
    last = (jnp.max(counts) + (size - 1)) // size
    state = one_round((jnp.int32(0), y))
    if size >= order.shape[0]:
        return state[1]
    return lax.while_loop(lambda state: state[0] < last, one_round, state)[1]
