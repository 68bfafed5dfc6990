"""Keys or values as attention reads them: a block of slots, by the program that was chosen.

Blocks are read as some chunks `[B, KH, n, slots of a chunk, C]`: XLA packs the right operand of a
dot anew at every call, a chunk at a time stays in the cache meanwhile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.block_tensor import BLOCK, BlockTensor
from fdq.cache.cache_tensor import CacheTensor
from fdq.cache.rotation import rotated
from fdq.ops.choice import trace_target
from fdq.ops.dots import (
    exact_dot,
    join_bfloat16,
    join_rows,
    split_bfloat16,
    split_rows,
    sum_in_chains,
)

Decode = Callable[[jax.Array], list[jax.Array]]

# With as many queries the cost of turning their scores is more than that of repacking keys.
_FEW_ROWS = 64


def _batched_dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """`[B, KH, n, R, C]` times `y [B, KH, n, ., .]` over C, `axis` of y; int8 -> int32."""
    wanted = jnp.int32 if y.dtype == jnp.int8 else jnp.float32
    dot = functools.partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if y.dtype == jnp.float32 else None,
        preferred_element_type=wanted,
    )
    leading = ((0, 1, 2), (0, 1, 2))
    if axis == 4 and x.shape[3] <= _FEW_ROWS and trace_target().platform == "cpu":
        # Keys lie as a left operand wants them; XLA would turn them to the right, and repack them.
        scores = dot(y, x, (((4,), (4,)), leading))
        return jnp.swapaxes(lax.optimization_barrier(scores), 3, 4)
    return dot(x, y, (((4,), (axis,)), leading))


def rounded_to(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 as a narrower dtype has it, still float32; None leaves it.

    What is summed besides a dot, for its zero points, is what the dot multiplies.
    """
    if dtype is None:
        return x
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


# Floats of a vector register of AVX2, and slots that are summed before anything is written.
_LANES = 8
_SUMMED_SLOTS = 16


def _lane_scores(rows: list[jax.Array], codes: jax.Array, decode: Decode) -> jax.Array:
    """`[B, KH, R, C]` times what `codes [B, KH, S, C]` decode to, over C, summed over planes.

    One element-wise fusion decodes keys in registers and leaves a sum for each lane; XLA's own sum
    over them would take longer than a dot with ones.
    """
    b, kh, r, _ = rows[0].shape
    slots = codes.shape[2]
    parts = [lax.optimization_barrier(x).reshape(b, kh, r, 1, -1, _LANES) for x in rows]
    codes = codes.reshape(b, kh, 1, slots, -1, _LANES)
    # Decoded after it is cut: XLA would write what several products have in common.
    products = [
        x[..., i, :] * y
        for i in range(codes.shape[4])
        for x, y in zip(parts, decode(codes[..., i, :]), strict=True)
    ]
    lanes = lax.optimization_barrier(sum_in_chains(products)).reshape(-1, _LANES)
    scores = exact_dot(lanes, jnp.ones((_LANES, 1), jnp.float32))
    return scores.reshape(b, kh, r, slots)


def _lane_sums(weights: jax.Array, codes: jax.Array, decode: Decode) -> list[jax.Array]:
    """`[B, KH, R, S]` times what `codes [B, KH, S, C]` decode to, over S, a result a plane."""
    b, kh, r, slots = weights.shape
    block = math.gcd(slots, _SUMMED_SLOTS)
    w = weights.reshape(b, kh, r, slots // block, block)
    w = lax.optimization_barrier(w.transpose(0, 1, 3, 4, 2))[..., None]
    codes = codes.reshape(b, kh, slots // block, block, 1, -1)
    ones = jnp.ones((b, kh, 1, 1, slots // block), jnp.float32)

    def summed(values: tuple[jax.Array, ...]) -> jax.Array:
        products = [w[:, :, :, j] * value for j, value in enumerate(values)]
        total = lax.optimization_barrier(sum_in_chains(products))
        total = total.reshape(b, kh, slots // block, -1)
        total = total[:, :, None]
        return _batched_dot(ones, total, 3).reshape(b, kh, r, -1)

    # Of each slot of a block, as in `_lane_scores`; then of each plane.
    decoded = [decode(codes[:, :, :, j]) for j in range(block)]
    return [summed(values) for values in zip(*decoded, strict=True)]


# Slots that are read at a time by dots of narrow rows, at most: of int8, and of bfloat16.
_CHUNK = 4096
_BFLOAT16_CHUNK = 512
# Of the codes of a block, and of its scores, which have three integers and some floats each: XLA
# maps temporary memory of more than 32 MB anew at every call.
_MOST_BYTES = 2**23
_BYTES_OF_A_SCORE = 16
MOST_SUMMED = 2**17
"""Slots whose products of two int8 are summed in one int32, at most: 127 * 127 * 2^17 < 2^31."""
# Of a cache that is decoded to be read: a quarter of a megabyte of each head.
_DECODED_SLOTS = 512
# Of a cache that may be nearly empty.
_BLOCKS = 8
_FEWEST_SLOTS = 512


class Side:
    """Keys or values, with the scales that are folded into what they are multiplied with.

    Floats of queries and weights are `[B, KH, n, R, ...]`, R rows for each of n chunks of slots;
    those of all chunks of a block together have no n. With `narrow` operands of dots are rounded to
    that dtype, for tensor cores.
    """

    def __init__(self, tensor: CacheTensor, program: str, narrow: Any = None):
        self.tensor = tensor
        self.narrow = narrow
        self.slots = tensor.shape[2]
        self.planes = tensor.format.planes
        # How floats are taken apart, and their products brought together.
        self.split = self.join = None
        self.chunked = program == "parts"
        if self.chunked:
            if tensor.codes.dtype == jnp.bfloat16:
                self.split, self.join = split_bfloat16, join_bfloat16
            elif tensor.format.integer_planes(tensor.codes[:0]) is not None:
                self.split, self.join = split_rows, join_rows
        # A lane decodes the numbers of a byte of its own.
        apart = tensor.codes.shape[3] * self.planes == tensor.head_dim
        self.lanes = program == "lanes" and apart
        scale, zero = tensor.scale, tensor.zero
        self.token_scale, self.token_zero = (scale, zero) if tensor.dynamic else (None, None)
        wide = (
            None if a is None or tensor.dynamic else tensor.over_channels(a) for a in (scale, zero)
        )
        self.static_scale, self.static_zero = wide

    def block(self, size: int, rows: int) -> int:
        """How many slots to read at a time for so many queries of a KV head, at most `size`."""
        size = min(size, MOST_SUMMED)
        if self.chunked:
            # Of a symbolic batch, as in an export, one sequence is reckoned with.
            b, kh, rows = (n if isinstance(n, int) else 1 for n in (*self.tensor.shape[:2], rows))
            codes = self.tensor.codes.shape[3] * self.planes * self.tensor.codes.dtype.itemsize
            most = _MOST_BYTES // (b * kh * max(codes, rows * _BYTES_OF_A_SCORE))
            size = min(size, max(_FEWEST_SLOTS, min(most, self.slots // _BLOCKS)))
        return min(size, self.slots)

    @property
    def lies_as_read(self) -> bool:
        """Whether dots read the codes themselves, and nothing is written for them."""
        return self.planes == 1 and self.tensor.codes.dtype in (jnp.int8, jnp.bfloat16, jnp.float32)

    def chunks(self, size: int) -> int:
        """How many a block of so many slots is read as."""
        if not self.chunked:
            return 1
        longest = min(size, _BFLOAT16_CHUNK if self.split is split_bfloat16 else _CHUNK)
        return size // next((c for c in range(longest, longest // 4, -1) if size % c == 0), size)

    def _codes(self, start, size) -> jax.Array:
        codes = self._cut(self.tensor.codes, start, size)
        # XLA has no vector instructions for a fusion that cuts out of the cache itself.
        return lax.optimization_barrier(codes) if self.lanes else codes

    def _block(self, start, size) -> list[jax.Array]:
        """`[B, KH, n, slots, C]` values of the codes of a block, as narrow as the program's."""
        codes = self._codes(start, size)
        if self.split is split_rows:
            planes = self.tensor.format.integer_planes(codes)
            assert planes is not None
        else:
            planes = [codes] if self.split else self.tensor.format.decode_planes(codes)
        return [self._chunked(plane, size) for plane in planes]

    def _chunked(self, a: jax.Array, size: int) -> jax.Array:
        """`[B, KH, size, ...]` -> `[B, KH, n, slots of a chunk, ...]`."""
        n = self.chunks(size)
        return a.reshape(*a.shape[:2], n, size // n, *a.shape[3:])

    def rows(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """What floats `[..., R, C]` are multiplied as, themselves or narrow rows, and steps."""
        if self.split is None:
            return x, None
        # Without the barriers XLA computes again what made x for each part of it.
        return lax.optimization_barrier(self.split(lax.optimization_barrier(x), axis=-2))

    def _joined(self, sums: jax.Array, step: jax.Array | None) -> jax.Array:
        """The products of `rows` with anything, `[B, KH, n, rows, .]` -> `[B, KH, n, R, .]`."""
        if self.join is None:
            return sums
        sums = self.join(sums, axis=-2)
        return sums if step is None else sums * step

    def dots(self, queries: tuple[jax.Array, jax.Array | None], start, size) -> jax.Array:
        """`[B, KH, n, R, slots]`: queries `[B, KH, R, D]`, as `rows` made them, times a block."""
        rows, step = queries
        planes = [rows[..., p :: self.planes] for p in range(self.planes)]
        if self.lanes and self.tensor.codes.shape[3] % _LANES == 0:
            codes = self._codes(start, size)
            return _lane_scores(planes, codes, self.tensor.format.decode_planes)[:, :, None]

        def dot(some: jax.Array, plane: jax.Array) -> jax.Array:
            b, kh, n = plane.shape[:3]
            some = jnp.broadcast_to(some[:, :, None], (b, kh, n, *some.shape[2:]))
            return self._dot(some, plane, 4)

        sums = functools.reduce(jnp.add, map(dot, planes, self._block(start, size)))
        return self._joined(sums, None if step is None else step[:, :, None])

    def _dot(self, x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
        if self.narrow is not None:
            x, y = x.astype(self.narrow), y.astype(self.narrow)
        return _batched_dot(x, y, axis)

    def scaled(self, x: jax.Array) -> jax.Array:
        """Queries or the output, times static scales, or turned as what is stored is."""
        x = rotated(x) if self.tensor.rotated else x
        return x if self.static_scale is None else x * self.static_scale

    def finish_scores(self, scores, query_sum, start, size) -> jax.Array:
        """The scores of a block, from the `dots` and the sums of the queries `[B, KH, R, 1]`."""
        if self.token_scale is None:
            # A static zero point adds the same to all scores of a query: the softmax removes it.
            return scores
        if self.token_zero is not None:
            scores = scores - query_sum[:, :, None] * self._of_slots(self.token_zero, start, size)
        return scores * self._of_slots(self.token_scale, start, size)

    def left_in(self, queries: jax.Array) -> jax.Array | None:
        """What `finish_scores` leaves in all scores of `scaled` queries alike, `[B, KH, R, 1]`."""
        if self.tensor.mean is not None:
            mean = rotated(self.tensor.mean) if self.tensor.rotated else self.tensor.mean
            return -jnp.sum(queries * mean[None, :, None, :], axis=-1, keepdims=True)
        if self.static_zero is None:
            return None
        return jnp.sum(queries * self.static_zero, axis=-1, keepdims=True)

    def kept(self, x: jax.Array) -> jax.Array:
        """An intermediate that every reader is to read, where each would compute it again."""
        return lax.optimization_barrier(x) if self.chunked else x

    def weighted_sum(self, weights, start, size) -> list[jax.Array]:
        """`[B, KH, R, D / planes]` sums over a block, by weights `[B, KH, n, R, slots]`."""
        if self.token_scale is not None:
            weights = weights * self._of_slots(self.token_scale, start, size)
        weights = rounded_to(weights, self.narrow)
        if self.lanes and size % _LANES == 0:
            codes = self._codes(start, size)
            sums = _lane_sums(weights[:, :, 0], codes, self.tensor.format.decode_planes)
        else:
            rows, step = self.rows(weights)
            dots = [self._dot(rows, plane, 3) for plane in self._block(start, size)]
            sums = [jnp.sum(self._joined(self.kept(y), step), axis=2) for y in dots]
        if self.token_zero is None:
            return sums
        zero = self._of_slots(self.token_zero, start, size)
        shift = jnp.sum(jnp.sum(weights * zero, axis=-1, keepdims=True), axis=2)
        return [s - shift for s in sums]

    def left_in_output(self) -> jax.Array | None:
        """`[1, KH, 1, D or 1]`: what `scaled` leaves in outputs, times the sum of weights."""
        if self.tensor.mean is not None:
            return -self.tensor.mean[None, :, None, :]
        if self.static_zero is None or self.static_scale is None:
            return None
        return self.static_zero * self.static_scale

    def seen_below(self, position: jax.Array) -> jax.Array:
        """The slot before which a query at `position` reads what is stored."""
        return position + 1

    def _cut(self, a: jax.Array, start: Any, size: int) -> jax.Array:
        return a if size == self.slots else lax.dynamic_slice_in_dim(a, start, size, axis=2)

    def _of_slots(self, a: jax.Array, start: Any, size: int) -> jax.Array:
        """Scales or zero points of a block, float32 `[B, KH, n, 1, slots]`."""
        return self._chunked(self._cut(a, start, size).astype(jnp.float32), size)[:, :, :, None, :]


class BlockSide(Side):
    """Of a `BlockTensor`: blocks before a query's own, whose scales are not one for a token.

    What is read is decoded, so many slots at a time.
    """

    tensor: BlockTensor

    def __init__(self, tensor: BlockTensor, program: str, narrow: Any = None):
        super().__init__(tensor, "decoded" if program != "decoded" else program, narrow)
        self.token_scale = self.token_zero = self.static_scale = self.static_zero = None
        self.slots = tensor.full

    def block(self, size: int, rows: int) -> int:
        """Whole blocks of tokens."""
        size = super().block(min(size, _DECODED_SLOTS), rows)
        return max(1, -(-size // BLOCK)) * BLOCK

    @property
    def lies_as_read(self) -> bool:
        """Never: numbers are made of codes."""
        return False

    def seen_below(self, position: jax.Array) -> jax.Array:
        """The first slot of its own block, which is read as it is: `open_block`."""
        return position // BLOCK * BLOCK

    def _block(self, start, size) -> list[jax.Array]:
        rows = self.tensor.unit[0]

        def cut(a: jax.Array, rows: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, start // rows, size // rows, axis=2)

        scale, zero = self.tensor.scale, self.tensor.zero
        parts = cut(self.tensor.codes, 1), cut(scale, rows)
        planes = self.tensor.decoded_planes(*parts, None if zero is None else cut(zero, rows))
        return [self._chunked(plane, size) for plane in planes]


def cache_side(tensor: CacheTensor, program: str, narrow: Any = None) -> Side:
    """A cache tensor as attention reads it."""
    if isinstance(tensor, BlockTensor):
        return BlockSide(tensor, program, narrow)
    return Side(tensor, program, narrow)
