"""CCQ: WINT2's codes chosen four rows at a time, the error of each four made up for by the others.

Minimizes `tr(Dᵀ H D)`, D the change of a weight `[K, N]` and H the second moment of its input. A
byte of a column stands for four rows, so it is four rows that are chosen together, of 256 words, by
what an error costs once the rows to come have made up for it: with `inv(H) = Uᵀ U` the squares of
`U_bb⁻ᵀ` times the error, `U_bb` the four rows' own part of U (GPTQ with blocks for rows,
arXiv 2210.17323). Then four by four they are gone over again, each the best beside all others, and
local and super scales are refitted.

Which words there are, the code scale and offset of a column say, and which suit a column shows only
when it is encoded: pairs that are good for normal numbers are tried for all columns, and each keeps
its best. With the second moment of gradients at the output, blocks of columns make up for those
before, too (`column_blocks`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdq.formats import Arrays, exact_arithmetic, packing
from fdq.formats.convolutional import (
    CC2,
    GROUP,
    LARGEST_LOCAL_SCALE,
    ROWS_PER_CODE,
    TYPICAL_LOCAL_SCALE,
    Convolutional,
)
from fdq.quantizers import column_blocks, second_moment
from fdq.quantizers.quantizer import Quantizer, Statistics, by_slabs, format_of
from fdq.schemes.scheme import WeightSpec

ROUNDS = 4  # of refitting scales, then going over all codes
COLUMN_BLOCKS = 16  # at most, of columns that hear of each other
SMALLEST_BLOCK = 16
SLAB = 512  # columns that are encoded together: their words fit a core's cache
TRIED_ROWS = 1 << 15  # rows that the pairs are tried on: long columns are alike under all

# Code scale, offset and the value of one unit for weights of unit variance; found among 100,000
# pairs by their error of normal numbers. None has a word within 0.002 of the next, so that a fused
# multiplication decodes to the same.
PAIRS = np.array([
    (120.956170, 1129.4370, 0.06139),
    (120.916855, 1361.0885, 0.0626),
    (119.950493, 1587.0284, 0.0604),
    (120.039459, 1371.0718, 0.0626),
    (123.082115, 725.4260, 0.0604),
    (121.026352, 763.5093, 0.0604),
    (121.044228, 1229.1194, 0.0604),
    (119.918434, 750.3782, 0.0604),
    (123.060638, 854.0953, 0.0604),
    (120.940445, 903.5462, 0.0604),
    (120.960777, 1101.0049, 0.0626),
    (120.031654, 1709.4819, 0.0626),
    (121.002434, 712.8154, 0.0626),
    (121.017708, 358.4760, 0.0604),
    (117.770523, 1669.8015, 0.0604),
    (119.957672, 1959.8092, 0.0604),
    (119.912300, 1309.9998, 0.0604),
    (123.070587, 380.2015, 0.0604),
    (120.016914, 260.4437, 0.0626),
    (121.804367, 157.3620, 0.0604),
    (123.163933, 873.3801, 0.0604),
    (117.734047, 1943.0358, 0.0626),
    (121.767197, 1100.7567, 0.0604),
    (123.103531, 263.8858, 0.0604),
    (123.133759, 1111.9034, 0.0604),
    (120.847778, 1632.0408, 0.0604),
    (117.797295, 1707.8843, 0.0626),
    (120.871391, 606.4841, 0.0604),
    (121.054085, 1729.5850, 0.0604),
    (120.886162, 1286.5309, 0.0626),
    (119.943184, 1815.4165, 0.0626),
    (119.884674, 1950.3998, 0.0604),
], np.float64)  # fmt: skip


class Ccq(Quantizer):
    """`ccq`, with feedback along the inputs; `ccq2`, between blocks of outputs as well."""

    one_at_a_time = True

    def __init__(self, name: str, statistics: tuple[str, ...]):
        self.name, self.statistics = name, statistics
        self.required = statistics

    def unsupported(self, spec: WeightSpec, dtype: Any = jnp.float32) -> str | None:
        """Other formats have `gptq` and `ldlq`."""
        del dtype
        return None if isinstance(format_of(spec), Convolutional) else "is for WINT2"

    def matrix(self, w: jax.Array, spec: WeightSpec, statistics: Statistics) -> Arrays:
        """Chooses the codes of all columns, rows in the order of their mean squares."""
        del spec
        w = w.astype(jnp.float32)
        size = jnp.max(jnp.abs(w))
        # A power of two, by which a scale that was rounded is multiplied exactly.
        size = jnp.ldexp(jnp.float32(1.0), jnp.frexp(jnp.where(size > 0, size, 1.0))[1])
        w = w / size
        rows = _Rows.of(second_moment.damped(statistics["input_moment"]))
        n = w.shape[1]
        if "output_moment" in self.statistics:
            outputs = statistics["output_moment"]
            columns = second_moment.act_order(outputs)
            back = jnp.argsort(columns)

            def encode(part: jax.Array, root: jax.Array):
                del root  # columns have codes and scales of their own
                return rows.encoded(part)

            block = max(SMALLEST_BLOCK, -(-n // COLUMN_BLOCKS))
            outputs = second_moment.in_order(outputs, columns)
            found = column_blocks.by_blocks(w[:, columns], outputs, block, encode)
            arrays = {name: a[:, back] for name, a in zip(_FIELDS, found, strict=True)}
        else:
            arrays = by_slabs(
                w,
                -(-n // SLAB),
                lambda slab: dict(zip(_FIELDS, rows.encoded(slab)[0], strict=True)),
            )
        arrays["scale"] = packing.pack(arrays["scale"], 4)
        return arrays | {"super_scale": arrays["super_scale"] * size}


_FIELDS = ("codes", "scale", "code_scale", "code_offset", "super_scale")


class _Sweep(NamedTuple):
    """How four rows are chosen: `[K / 4, 4, K]` what others pull at them, `[K / 4, 4, 4]` the
    lower triangular root of what an error costs.
    """

    pull: jax.Array
    root: jax.Array


class _Columns(NamedTuple):
    """Columns as encoded: all but `words` (of one pair, or of each column) float32 or int32."""

    codes: jax.Array  # [K / 4, n]
    local: jax.Array  # [K / 64, n]
    scale: jax.Array  # [1, n], the super scale
    words: jax.Array  # [256, 4, n or 1]

    def values(self) -> jax.Array:
        """What codes stand for without scales, `[K, n]`."""
        k, n = self.codes.shape[0] * ROWS_PER_CODE, self.codes.shape[1]
        words = jnp.broadcast_to(self.words, (*self.words.shape[:2], n))
        index = jnp.broadcast_to(self.codes[:, None], (k // ROWS_PER_CODE, ROWS_PER_CODE, n))
        return jnp.take_along_axis(words, index, axis=0).reshape(k, n)

    def scaled(self) -> jax.Array:
        """Values times local scales, `[K, n]`."""
        values = self.values()
        groups = values.reshape(-1, GROUP, values.shape[1])
        return (groups * self.local[:, None]).reshape(values.shape)


class _Rows:
    """Feedback between the rows of a weight whose inputs have this moment `[K, K]`."""

    def __init__(self, moment: jax.Array, order: jax.Array, feedback: _Sweep, descent: _Sweep):
        self.moment, self.order = moment, order
        self.feedback, self.descent = feedback, descent

    @classmethod
    def of(cls, moment: jax.Array) -> _Rows:
        """From a damped moment; fours of the largest mean squares come first."""
        k = moment.shape[0]
        fours = jnp.arange(k, dtype=jnp.int32).reshape(-1, ROWS_PER_CODE)
        mean = jnp.mean(jnp.diagonal(moment).reshape(fours.shape), axis=1)
        order = jnp.argsort(-mean, stable=True).astype(jnp.int32)
        rows = fours[order].reshape(k)
        factor = second_moment.feedback_factor(second_moment.in_order(moment, rows))
        back = jnp.argsort(rows)
        factor = factor[back][:, back]  # [K, K], rows pull at columns that come after them
        own = jax.vmap(lambda b: factor[b[:, None], b[None]])(fours)
        eye = jnp.broadcast_to(jnp.eye(ROWS_PER_CODE, dtype=jnp.float32), own.shape)
        root = jax.scipy.linalg.solve_triangular(jnp.swapaxes(own, 1, 2), eye, lower=True)
        pull = factor.T.reshape(-1, ROWS_PER_CODE, k)
        feedback = _Sweep(pull, root)
        own = jax.vmap(lambda b: moment[b[:, None], b[None]])(fours)
        inverse = jnp.linalg.inv(own)
        pull = -jnp.einsum(
            "bij,bjk->bik",
            inverse,
            moment.reshape(-1, ROWS_PER_CODE, k),
            precision=lax.Precision.HIGHEST,
        )
        pull = pull + jnp.eye(k, dtype=jnp.float32).reshape(pull.shape)
        upper = jnp.linalg.cholesky(own[:, ::-1, ::-1])[:, ::-1, ::-1]
        return cls(moment, order, feedback, _Sweep(pull, jnp.swapaxes(upper, 1, 2)))

    def encoded(self, w: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """`[K, n]` -> the `_FIELDS`, `scale` not yet packed, and what they decode to."""
        k, n = w.shape
        tried = max(1, min(len(PAIRS), TRIED_ROWS // k))
        pairs = jnp.asarray(PAIRS[:tried], jnp.float32)

        def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]):
            least, kept = best
            i = jnp.asarray(i, jnp.int32)
            found = self._refitted_scale(w, self._fed(w, self._first(w, pairs, i[None])))
            loss = self._loss(w, found)
            return jnp.minimum(least, loss), jnp.where(loss < least, i, kept)

        start = (jnp.full((n,), jnp.inf, jnp.float32), jnp.zeros((n,), jnp.int32))
        which = lax.fori_loop(0, tried, attempt, start)[1]
        columns = self._fed(w, self._first(w, pairs, which))

        def refine(_: jax.Array, columns: _Columns) -> _Columns:
            columns = self._refitted_scale(w, columns)
            columns = self._refitted_local(w, columns)
            return self._swept(w, columns, self.descent, w - columns.scaled() * columns.scale)

        columns = lax.fori_loop(0, ROUNDS, refine, columns)
        found = (
            columns.codes.astype(jnp.uint8),
            columns.local.astype(jnp.uint8),
            pairs[which, 0][None],
            pairs[which, 1][None],
            columns.scale,
        )
        return found, columns.scaled() * columns.scale

    def _first(self, w: jax.Array, pairs: jax.Array, which: jax.Array) -> _Columns:
        """Scales that match the spread of groups, under the pairs `which` `[n]` or `[1]`."""
        k, n = w.shape
        h = jnp.diagonal(self.moment).reshape(-1, GROUP, 1)
        squares = jnp.sum(h * jnp.square(w.reshape(-1, GROUP, n)), axis=1)
        spread = jnp.sqrt(squares / jnp.sum(h, axis=1))
        whole = jnp.sqrt(jnp.mean(jnp.square(spread), axis=0, keepdims=True))
        widest = jnp.max(spread, axis=0, keepdims=True)
        step = jnp.maximum(whole / TYPICAL_LOCAL_SCALE, widest / LARGEST_LOCAL_SCALE)
        step = jnp.where(step > 0, step, jnp.float32(1.0))
        local = jnp.clip(jnp.round(spread / step), 1, LARGEST_LOCAL_SCALE)
        local = jnp.where(spread > 0, local, jnp.float32(0.0))
        code_scale, offset, unit = (pairs[which, i][None] for i in range(3))
        codes = jnp.zeros((k // ROWS_PER_CODE, n), jnp.int32)
        return _Columns(codes, local, _rounded(unit * step), _words(code_scale, offset))

    def _fed(self, w: jax.Array, columns: _Columns) -> _Columns:
        return self._swept(w, columns, self.feedback, None)

    def _swept(
        self, w: jax.Array, columns: _Columns, sweep: _Sweep, left: jax.Array | None
    ) -> _Columns:
        """Codes chosen four rows after the other; `left` of w by the codes so far, or feedback."""
        words, n = columns.words, w.shape[1]
        parts = [words[:, i] for i in range(ROWS_PER_CODE)]  # [256, n or 1] each
        blocks = GROUP // ROWS_PER_CODE

        def four(state: tuple[jax.Array, jax.Array], b: jax.Array):
            pushed, codes = state
            start = b * ROWS_PER_CODE
            pulled = second_moment.product(sweep.pull[b], pushed)
            target = lax.dynamic_slice_in_dim(w, start, ROWS_PER_CODE) - pulled  # [4, n]
            root, scale = sweep.root[b], columns.local[b // blocks] * columns.scale[0]  # [n]
            wanted = second_moment.product(root, target)
            error = jnp.zeros((len(words), n), jnp.float32)
            for i in range(ROWS_PER_CODE):
                have = root[i, 0] * parts[0]
                for j in range(1, i + 1):
                    have = have + root[i, j] * parts[j]
                error = error + jnp.square(wanted[i][None] - scale[None] * have)
            code = jnp.argmin(error, axis=0).astype(jnp.int32)
            wide = jnp.broadcast_to(words, (*words.shape[:2], n))
            index = jnp.broadcast_to(code[None, None], (1, ROWS_PER_CODE, n))
            value = jnp.take_along_axis(wide, index, axis=0)[0] * scale[None]
            if left is None:
                own = second_moment.product(root, target - value)
            else:
                own = lax.dynamic_slice_in_dim(w, start, ROWS_PER_CODE) - value
            pushed = lax.dynamic_update_slice_in_dim(pushed, own, start, axis=0)
            return (pushed, lax.dynamic_update_slice_in_dim(codes, code[None], b, axis=0)), None

        pushed = jnp.zeros_like(w) if left is None else left
        codes = lax.scan(four, (pushed, columns.codes), self.order)[0][1]
        return columns._replace(codes=codes)

    def _loss(self, w: jax.Array, columns: _Columns) -> jax.Array:
        """`dᵀ H d` of each column, `[n]`."""
        left = w - columns.scaled() * columns.scale
        return jnp.sum(left * second_moment.product(self.moment, left), axis=0)

    def _refitted_scale(self, w: jax.Array, columns: _Columns) -> _Columns:
        """With the super scales of least loss."""
        scaled = columns.scaled()
        weighted = second_moment.product(self.moment, scaled)
        above = jnp.sum(weighted * w, axis=0, keepdims=True)
        below = jnp.sum(weighted * scaled, axis=0, keepdims=True)
        return columns._replace(scale=_rounded(jnp.where(above > 0, above / below, columns.scale)))

    def _refitted_local(self, w: jax.Array, columns: _Columns) -> _Columns:
        """With the local scales of least loss, one group beside the others after the other."""
        unit = columns.values() * columns.scale
        left = w - columns.scaled() * columns.scale

        def group(g: jax.Array, state: tuple[jax.Array, jax.Array]):
            left, local = state
            g = jnp.asarray(g, jnp.int32)
            rows = lax.dynamic_slice_in_dim(self.moment, g * GROUP, GROUP)
            own = lax.dynamic_slice_in_dim(rows, g * GROUP, GROUP, axis=1)
            mine = lax.dynamic_slice_in_dim(unit, g * GROUP, GROUP)
            slope = jnp.sum(mine * second_moment.product(rows, left), axis=0)
            curvature = jnp.sum(mine * second_moment.product(own, mine), axis=0)
            step = jnp.where(curvature > 0, slope / curvature, 0.0)
            new = jnp.clip(jnp.round(local[g] + step), 0, LARGEST_LOCAL_SCALE)
            new = jnp.where(local[g] > 0, jnp.maximum(new, 1.0), new)
            rest = lax.dynamic_slice_in_dim(left, g * GROUP, GROUP) - mine * (new - local[g])[None]
            left = lax.dynamic_update_slice_in_dim(left, rest, g * GROUP, axis=0)
            return left, local.at[g].set(new)

        groups = w.shape[0] // GROUP
        return columns._replace(local=lax.fori_loop(0, groups, group, (left, columns.local))[1])


def _words(code_scale: jax.Array, offset: jax.Array) -> jax.Array:
    """The values of all codes, float32 `[256, 4, n]`, of pairs `[1, n]`."""
    tables = (*exact_arithmetic.halves(code_scale), offset)
    codes = jnp.arange(256, dtype=jnp.uint8)[:, None]
    codes = jnp.broadcast_to(codes, (256, offset.shape[1]))
    return jnp.stack(CC2.decode_unit([codes], WeightSpec.default(CC2.name), tables), axis=1)


def _rounded(scale: jax.Array) -> jax.Array:
    """To what bfloat16 holds, as FastDeploy's files do, before codes are chosen by it."""
    return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)


CCQ1 = Ccq("ccq", ("input_moment",))
CCQ2 = Ccq("ccq2", ("input_moment", "output_moment"))
