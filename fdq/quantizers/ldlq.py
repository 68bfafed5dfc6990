"""LDLQ: trellis codes chosen one input at a time, the error of each made up for by those to come.

The squared error of a layer's output is `tr(Dᵀ H D)`, D the error of the weight `[K, N]` and H the
second moment of its input. A row of the weight is one input, and a trellis code of it a sequence
of its own: the Viterbi search finds the stream nearest to the row, then what that leaves is spread
over the rows to come as H says (QuIP, arXiv 2307.13304; the same as GPTQ's feedback).

With the second moment G of the loss's gradient at the output, it is `tr(G Dᵀ H D)` that counts
(YAQA, arXiv 2505.22988): blocks of columns are taken one after the other, and what is left of one
is also spread over the columns to come.
"""

from __future__ import annotations

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
COLUMN_BLOCKS = 8  # at most, of columns that hear of each other; of whole tiles
SMALL = 1e-4  # of the mean weight of a column, for columns of no weight


class LDLQ(Quantizer):
    """`ldlq`, with feedback along the inputs; `ldlq2`, between blocks of outputs as well."""

    one_at_a_time = True

    def __init__(self, name: str, statistics: tuple[str, ...]):
        self.name, self.statistics = name, statistics
        self.required = statistics

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Other formats have `gptq`, the same feedback for weights that are rounded one by one."""
        del dtype
        return None if isinstance(format_of(spec), Trellis) else "is for trellis codes"

    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """Chooses the streams of all rows, in the order of their mean squares."""
        format = format_of(spec)
        assert isinstance(format, Trellis)
        w = w.astype(jnp.float32)
        size = jnp.max(jnp.abs(w))
        # A power of two, by which a scale that was rounded is multiplied exactly.
        size = jnp.ldexp(jnp.float32(1.0), jnp.frexp(jnp.where(size > 0, size, 1.0))[1])
        moment = second_moment.damped(statistics["input_moment"])
        order = second_moment.act_order(moment)
        moment = second_moment.in_order(moment, order)
        factor = second_moment.feedback_factor(moment)
        rows = _Rows(format, moment, factor)
        w = w[order] / size
        if "output_moment" in self.statistics:
            block = TILE * max(1, -(-w.shape[1] // (TILE * COLUMN_BLOCKS)))

            def encode(part: jax.Array, cost: jax.Array):
                codes, scale, decoded = rows.encode(part, cost)
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
        self, w: jax.Array, outputs: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[K, n]` -> stored codes, scale float32 `[1, n]`, and what these decode to.

        The scale is that of the spread of the columns, fitted once to the codes.
        """
        format, h = self.format, jnp.diagonal(self.moment)[:, None]
        scale = _rounded(format.first_scale(w, h))
        weights = jnp.square(scale) if outputs is None else jnp.square(scale) * outputs
        mean = jnp.mean(weights)
        weights = weights / jnp.where(mean > 0, mean, jnp.float32(1.0)) + jnp.float32(SMALL)
        levels, codes = self._feed(w, scale, weights)
        weighted = second_moment.product(self.moment, levels)
        above = jnp.sum(weighted * w, axis=0, keepdims=True)
        below = jnp.sum(weighted * levels, axis=0, keepdims=True)
        scale = _rounded(jnp.where(above > 0, above / below, scale))
        return codes, scale, levels * scale

    def _feed(
        self, w: jax.Array, scale: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Levels `[K, n]` and stored codes of rows rounded in turn."""
        k, n = w.shape
        total = k + self.missing
        w = jnp.pad(w, [(0, self.missing), (0, 0)])

        def block(w: jax.Array, start: jax.Array):
            factor = lax.dynamic_slice_in_dim(self.factor, start, BLOCK)  # [BLOCK, K]
            inner = lax.dynamic_slice_in_dim(factor, start, BLOCK, axis=1)

            def row(rows: jax.Array, i: jax.Array):
                target = rows[i]
                codes = self.format.nearest(target[None], scale, weights)
                levels = self.format.levels(codes)[0]
                error = (target - levels * scale[0]) / inner[i, i]
                after = jnp.where(jnp.arange(BLOCK) > i, inner[i], 0.0)
                return rows - after[:, None] * error[None], (levels, codes[0], error)

            rows = lax.dynamic_slice_in_dim(w, start, BLOCK)
            _, (levels, codes, errors) = lax.scan(row, rows, jnp.arange(BLOCK))
            return w - second_moment.product(factor.T, errors), (levels, codes)

        _, (levels, codes) = lax.scan(block, w, jnp.arange(0, total, BLOCK))
        return levels.reshape(total, n)[:k], codes.reshape(total, -1)[:k]


def _rounded(scale: jax.Array) -> jax.Array:
    """To what bfloat16 holds, before codes are chosen by it."""
    return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)


LDLQ1 = LDLQ("ldlq", ("input_moment",))
LDLQ2 = LDLQ("ldlq2", ("input_moment", "output_moment"))
