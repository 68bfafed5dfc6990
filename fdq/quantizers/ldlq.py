"""LDLQ: trellis codes chosen one input at a time, the error of each made up for by those to come.

The squared error of a layer's output is `tr(Dᵀ H D)`, D the error of the weight `[K, N]` and H the
second moment of its input. A row of the weight is one input, and a trellis code of it a sequence
of its own: the Viterbi search finds the stream nearest to the row, then what that leaves is spread
over the rows to come as H says (QuIP, arXiv 2307.13304; the same as GPTQ's feedback).

With the second moment G of the loss's gradient at the output, it is `tr(G Dᵀ H D)` that counts
(YAQA, arXiv 2505.22988): blocks of columns are taken one after the other, and what is left of one
is also spread over the columns to come; within a tile, whose columns are one stream, the search
spreads the errors of each of its paths (`fdq.formats.survivors`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.formats import Arrays
from fdq.formats.trellis import TILE, Trellis
from fdq.quantizers import column_blocks, second_moment
from fdq.quantizers.quantizer import Quantizer, Statistics, format_of
from fdq.schemes.scheme import WeightSpec

BLOCK = 64  # rows between which feedback goes by a matrix product
COLUMN_BLOCKS = 8  # at most, of whole tiles; tiles of a block do not hear of each other
RIDGE = 1e-5  # of the diagonal, for scales that are fitted together
SMALL = 1e-4  # of the mean weight of a column, for columns of no weight

Search = Callable[[jax.Array], jax.Array]
"""Stored codes of rows `[k, n]`."""


class LDLQ(Quantizer):
    """`ldlq`, with feedback along the inputs; `ldlq2`, between and within blocks of outputs too."""

    one_at_a_time = True

    def __init__(self, name: str, statistics: tuple[str, ...]):
        self.name, self.statistics = name, statistics
        self.required = statistics

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Other formats have `gptq`, the same feedback for weights that are rounded one by one."""
        del dtype
        return None if isinstance(format_of(spec), Trellis) else "is for trellis codes"

    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """Chooses the streams of all rows, in the order in which errors are made up for best."""
        format = format_of(spec)
        assert isinstance(format, Trellis)
        w = w.astype(jnp.float32)
        size = jnp.max(jnp.abs(w))
        # A power of two, by which a scale that was rounded is multiplied exactly.
        size = jnp.ldexp(jnp.float32(1.0), jnp.frexp(jnp.where(size > 0, size, 1.0))[1])
        moment = second_moment.damped(statistics["input_moment"])
        order = second_moment.pivot_order(moment)
        moment = second_moment.in_order(moment, order)
        factor = second_moment.feedback_factor(moment)
        rows = _Rows(format, moment, factor)
        w = w[order] / size
        if "output_moment" in self.statistics:
            block = TILE * max(1, -(-w.shape[1] // (TILE * COLUMN_BLOCKS)))

            def encode(part: jax.Array, root: jax.Array):
                codes, scale, decoded = rows.encode(part, root)
                return (codes, scale), decoded

            outputs = statistics["output_moment"]
            codes, scale = column_blocks.by_blocks(w, outputs, block, encode)
        else:
            codes, scale, _ = rows.encode(w)
        back = jnp.argsort(order)
        return {"codes": codes[back], "scale": (scale * size).astype(jnp.bfloat16)}


class _Rows:
    """Feedback along the rows of a weight, which are in the order of the moment `[K, K]`."""

    def __init__(self, format: Trellis, moment: jax.Array, factor: jax.Array):
        self.format, self.moment = format, moment
        k = moment.shape[0]
        self.missing = -k % BLOCK
        padded = jnp.pad(factor, [(0, self.missing)] * 2)
        unused = jnp.arange(k + self.missing) >= k
        self.factor = padded + jnp.diag(unused.astype(jnp.float32))

    def encode(
        self, w: jax.Array, root: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[K, n]` -> stored codes, scale float32 `[1, n]`, and what these decode to.

        The scale is that of the spread of the columns, fitted once to the codes. With the `root` C
        of what errors E cost, the squares of `E C`, errors in a row are made up for in its tile.
        """
        format, h = self.format, jnp.diagonal(self.moment)[:, None]
        scale = _rounded(format.first_scale(w, h))
        cost = None if root is None else second_moment.product(root, root.T)
        search = self._search(scale, cost)
        levels, codes = self._feed(w, scale, search)
        scale = self._fitted(w, levels, scale, cost)
        return codes, scale, levels * scale

    def _search(self, scale: jax.Array, cost: jax.Array | None) -> Search:
        """Of rows, by what errors of `w / scale` cost."""
        if cost is None:
            weights = jnp.square(scale)
            weights = weights / _or_one(jnp.mean(weights)) + jnp.float32(SMALL)
            return lambda row: self.format.nearest(row, scale, weights)
        cost = scale.T * cost * scale
        cost = cost / _or_one(jnp.mean(jnp.diagonal(cost)))
        found = []
        for start, stop, tile in self.format.tiles(cost.shape[0]):
            own = jnp.stack([cost[i : i + tile, i : i + tile] for i in range(start, stop, tile)])
            found.append(jax.vmap(functools.partial(_in_parts, part=self.format.part(tile)))(own))
        weights = jnp.concatenate([weights.reshape(1, -1) for weights, _ in found], axis=1)
        feedback = [each for _, each in found]
        return lambda row: self.format.nearest(row, scale, weights, feedback)

    def _fitted(
        self, w: jax.Array, levels: jax.Array, scale: jax.Array, cost: jax.Array | None
    ) -> jax.Array:
        """The scale of least cost for given levels, or of least error of each column."""
        weighted = second_moment.product(self.moment, levels)
        above = jnp.sum(weighted * w, axis=0, keepdims=True)
        below = jnp.sum(weighted * levels, axis=0, keepdims=True)
        apart = _rounded(jnp.where(above > 0, above / below, scale))
        if cost is None:
            return apart
        # Of the cost `s A s - 2 b s` of scales s; columns of unit diagonal.
        curved = cost * second_moment.product(weighted.T, levels)
        slope = jnp.sum(cost * second_moment.product(weighted.T, w), axis=1)
        diagonal = jnp.diagonal(curved)
        unit = jnp.where(diagonal > 0, lax.rsqrt(diagonal), 0.0)
        scaled = unit[:, None] * curved * unit[None] + RIDGE * jnp.eye(unit.size, dtype=jnp.float32)
        together = unit * jax.scipy.linalg.solve(scaled, unit * slope, assume_a="pos")
        together = _rounded(jnp.where(together > 0, together, apart[0]))[None]

        def total(s: jax.Array) -> jax.Array:
            return jnp.vdot(s, second_moment.product(s, curved) - 2.0 * slope[None])

        return jnp.where(total(together) < total(apart), together, apart)

    def _feed(self, w: jax.Array, scale: jax.Array, search: Search) -> tuple[jax.Array, jax.Array]:
        """Levels `[K, n]` and stored codes of rows rounded in turn."""
        k, n = w.shape
        total = k + self.missing
        w = jnp.pad(w, [(0, self.missing), (0, 0)])

        def block(w: jax.Array, start: jax.Array):
            factor = lax.dynamic_slice_in_dim(self.factor, start, BLOCK)  # [BLOCK, K]
            inner = lax.dynamic_slice_in_dim(factor, start, BLOCK, axis=1)

            def row(rows: jax.Array, i: jax.Array):
                target = rows[i]
                codes = search(target[None])
                levels = self.format.levels(codes)[0]
                error = (target - levels * scale[0]) / inner[i, i]
                after = jnp.where(jnp.arange(BLOCK) > i, inner[i], 0.0)
                return rows - after[:, None] * error[None], (levels, codes[0], error)

            rows = lax.dynamic_slice_in_dim(w, start, BLOCK)
            _, (levels, codes, errors) = lax.scan(row, rows, jnp.arange(BLOCK))
            return w - second_moment.product(factor.T, errors), (levels, codes)

        _, (levels, codes) = lax.scan(block, w, jnp.arange(0, total, BLOCK))
        return levels.reshape(total, n)[:k], codes.reshape(total, -1)[:k]


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.float32(1.0))


def _in_parts(cost: jax.Array, part: int) -> tuple[jax.Array, jax.Array]:
    """What errors `[n]` in a part cost by column `[n]`, and what they add to later parts `[n, n]`.

    With `cost = C Cᵀ`, C upper triangular, that of an error e is the squares of `e C`. Its columns
    of a part, divided by their own rows D, say what is best there; `D Dᵀ` is what is left of cost.
    """
    n = cost.shape[0]
    identity = jnp.eye(n, dtype=jnp.float32)
    inverse = second_moment.feedback_factor(cost + SMALL * identity)
    root = jax.scipy.linalg.solve_triangular(inverse, identity, lower=False)
    at = jnp.arange(n) // part
    own = at[:, None] == at[None]
    weights = jnp.sum(jnp.where(own, jnp.square(root), 0.0), axis=1)
    feedback = second_moment.product(root, jnp.where(own, inverse, 0.0))
    return weights, jnp.where(at[:, None] < at[None], feedback, 0.0)


def _rounded(scale: jax.Array) -> jax.Array:
    """To what bfloat16 holds, before codes are chosen by it."""
    return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)


LDLQ1 = LDLQ("ldlq", ("input_moment",))
LDLQ2 = LDLQ("ldlq2", ("input_moment", "output_moment"))
