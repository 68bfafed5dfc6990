"""Keys or values in blocks of 32 tokens: quantized when a block is full, kept exact until then.

Keys have one scale for each channel of a block: what is large in them is large in the same channels
of all tokens. Values have one for 64 channels of a token. (As KIVI does, arXiv 2402.02750.)

A token attends to all tokens of its own block before it as they are, and to earlier blocks by their
codes, however the tokens were cut into calls: what is fed at once attends as token by token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from fdq.cache.cache_tensor import OTHER_TENSORS, CacheTensor, format_of, join_planes
from fdq.cache.format import TURNED_SCALE_DTYPE
from fdq.schemes.scheme import CacheSpec

BLOCK = 32
"""Tokens of a block."""

_VALUE_CHANNELS = 64
_ZERO_DTYPE = jnp.float16  # zero points lie where the range does: 100 steps away from 0, or more
_LAST = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTensor(CacheTensor):
    """As `CacheTensor`, with granularity `block`.

    Slots are cut into `ceil(S / 32)` blocks. Codes and scales of a block count once a later one is
    begun; those of a last block of fewer slots never do.

    Attributes:
      scale: bfloat16, `[B, KH, ceil(S / rows), D / columns]`, where `unit` is (rows, columns).
      zero: zero points with fractions, float16 of the same shape; None where the format has none.
      open: `[B, KH, 32, D]`, the block that was written last, as it is.
      block: `[B]` int32, which block that is.
      end: `[B]` int32: slots at and after it are written with padding, which changes nothing.
      recent: after `write`, `[B, KH, R, D]`: all that `open` is and has become, R slots from the
        block `first` [B] on; None else.
      unit: tokens and channels that share a scale, (32, 1) or (1, 64).
    """

    open: Any = None
    block: Any = None
    end: Any = None
    recent: Any = None
    first: Any = None
    unit: tuple[int, int] = dataclasses.field(default=(BLOCK, 1), metadata={"static": True})

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int],
        spec: CacheSpec | None = None,
        *,
        scale: Any = None,
        zero: Any = None,
        mean: Any = None,
        dtype: Any = jnp.bfloat16,
        keys: bool = True,
    ) -> BlockTensor:
        """One without tokens, for `keys` or values of `shape`; `dtype` is that of the open block.

        Raises:
          ValueError: calibrated scales, which blocks have none of, or slots that are no number.
        """
        if scale is not None or zero is not None or mean is not None:
            raise ValueError(f"{spec} KV cache: expected no calibrated scales, found some.")
        b, heads, slots, d = shape
        if not isinstance(slots, int):
            raise ValueError(f"{spec} KV cache: expected a number of slots, found {slots}.")
        format = format_of(spec)
        unit = (BLOCK, 1) if keys else (1, d if d % _VALUE_CHANNELS else _VALUE_CHANNELS)
        small = (b, heads, -(-slots // unit[0]), d // unit[1])
        return cls(
            codes=jnp.zeros((*shape[:-1], format.width(d)), format.code_dtype),
            scale=jnp.zeros(small, TURNED_SCALE_DTYPE),
            zero=jnp.zeros(small, _ZERO_DTYPE) if format.has_zero else None,
            spec=spec,
            open=jnp.zeros((b, heads, BLOCK, d), dtype),
            block=jnp.zeros((b,), jnp.int32),
            end=jnp.full((b,), _LAST, jnp.int32),
            unit=unit,
        )

    @classmethod
    def of(cls, x: jax.Array, spec: CacheSpec, *, keys: bool = True) -> BlockTensor:
        """`x [B, KH, T, D]`, written to an empty one of T slots at once."""
        b, heads, t, d = x.shape
        tensor = cls.empty((b, heads, t, d), spec, dtype=x.dtype, keys=keys)
        return tensor.write(x.swapaxes(1, 2), jnp.int32(0)).settled()

    @property
    def kernel(self) -> str | None:
        """None: kernels read scales of tokens."""
        return None

    @property
    def full(self) -> int:
        """Slots of whole blocks."""
        return self.codes.shape[2] // BLOCK * BLOCK

    def axes(self) -> Self:
        """As of `CacheTensor`; scales of tokens are cut as tokens are."""
        small = "bh-d" if self.unit[0] > 1 else "bhs-"
        held = {"codes": "bhsd", "scale": small, "zero": small, "open": "bh-d"}
        held |= {"block": "b", "end": "b"}
        return self.replace(**{k: axes for k, axes in held.items() if getattr(self, k) is not None})

    def settled(self) -> Self:
        """Without what only attention over the tokens just written needs."""
        return self.replace(recent=None, first=None)

    def ending(self, ends: jax.Array | None) -> Self:
        """See `end`; None for no padding."""
        end = jnp.full_like(self.end, _LAST) if ends is None else ends.astype(jnp.int32)
        return self.replace(end=end)

    def write(self, x: jax.Array, start: jax.Array) -> Self:
        """With the tokens `x [B, T, KH, D]` at slots from `start` on, a scalar or [B].

        The block that `start` is in is the open one, or, where tokens were taken back beyond its
        beginning, what the codes of that block say.
        """
        b, t = x.shape[:2]
        slots = self.codes.shape[2]
        if not isinstance(t, int):
            raise ValueError(f"{self.spec} KV cache: expected a number of tokens, found {t}.")
        start = jnp.broadcast_to(start, (b,)).astype(jnp.int32)
        count = min(-(-(t + BLOCK - 1) // BLOCK) if t > 1 else 1, -(-slots // BLOCK))
        own = start // BLOCK
        first = jnp.clip(own, 0, -(-slots // BLOCK) - count)
        before = self._before(own)
        x = x.swapaxes(1, 2).astype(self.open.dtype)

        def placed(before: jax.Array, x: jax.Array, own: jax.Array, at: jax.Array) -> jax.Array:
            """`[KH, R, D]` of one sequence: its own block, and the new tokens over it."""
            recent = jnp.zeros((x.shape[0], count * BLOCK, x.shape[2]), x.dtype)
            recent = lax.dynamic_update_slice_in_dim(recent, before, own * BLOCK, axis=1)
            return lax.dynamic_update_slice_in_dim(recent, x, at, axis=1)

        recent = jax.vmap(placed)(before, x, own - first, start - first * BLOCK)
        # The block of the last slot that was written with a token.
        end = jnp.minimum(start + t, self.end)
        last = jnp.where(end > start, (end - 1) // BLOCK, self.block)
        open = jax.vmap(
            lambda recent, at: lax.dynamic_slice_in_dim(recent, at * BLOCK, BLOCK, axis=1)
        )(recent, last - first)
        open = jnp.where((end > start)[:, None, None, None], open, self.open)
        new = self.replace(open=open, block=last, recent=recent, first=first)
        return new._with_codes(own) if self.full else new

    def _before(self, own: jax.Array) -> jax.Array:
        """`[B, KH, 32, D]` of the block `own` [B], before anything is written to it."""
        if not self.full:
            return self.open
        stored = self._blocks(jnp.minimum(own, self.full // BLOCK - 1), 1)
        known = (own == self.block)[:, None, None, None]
        return jnp.where(known, self.open, self.decoded(*stored).astype(self.open.dtype))

    def _with_codes(self, own: jax.Array) -> Self:
        """With the codes of the blocks that `recent` has from `own` on."""
        assert self.recent is not None and self.first is not None
        recent, at = self.recent, self.first
        count = min(recent.shape[2], self.full) // BLOCK
        if self.full < self.codes.shape[2]:
            # A last block of fewer slots has no codes: the blocks before it are then one later.
            at = jnp.minimum(at, self.full // BLOCK - count)
            shift = (1 - (self.first - at)) * BLOCK
            cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=count * BLOCK, axis=1)
            padded = jnp.concatenate([jnp.zeros_like(self.open), recent], axis=2)
            recent = jax.vmap(cut)(padded, shift)
        made = self._quantized(recent.astype(jnp.float32))
        kept = self._blocks(at, count)
        which = at[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        mine = which >= own[:, None]

        def put(old: jax.Array | None, new: jax.Array | None, kept: jax.Array | None) -> Any:
            if old is None or new is None or kept is None:
                return None
            rows = new.shape[2] // count
            chosen = jnp.repeat(mine, rows, axis=1, total_repeat_length=new.shape[2])
            new = jnp.where(chosen[:, None, :, None], new.astype(old.dtype), kept)
            into = functools.partial(lax.dynamic_update_slice_in_dim, axis=1)
            return jax.vmap(into)(old, new, at * rows)

        pairs = zip((self.codes, self.scale, self.zero), made, kept, strict=True)
        codes, scale, zero = (put(*three) for three in pairs)
        return self.replace(codes=codes, scale=scale, zero=zero)

    def _blocks(self, at: jax.Array, count: int) -> tuple[Any, Any, Any]:
        """Codes, scales and zero points of `count` blocks from `at` [B] on."""

        def cut(a: jax.Array | None, rows: int) -> jax.Array | None:
            if a is None:
                return None
            of_one = functools.partial(lax.dynamic_slice_in_dim, slice_size=count * rows, axis=1)
            return jax.vmap(of_one)(a, at * rows)

        rows = BLOCK // self.unit[0]
        return cut(self.codes, BLOCK), cut(self.scale, rows), cut(self.zero, rows)

    def _quantized(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """float32 `[B, KH, R, D]` of whole blocks as codes, scales and zero points."""
        rows, columns = self.unit
        b, heads, slots, d = x.shape
        units = x.reshape(b, heads, slots // rows, rows, d // columns, columns)
        low, high = jnp.min(units, axis=(3, 5)), jnp.max(units, axis=(3, 5))
        scale, zero = self.format.fit_range(low, high)
        scale, zero = (
            scale.astype(TURNED_SCALE_DTYPE),
            None if zero is None else zero.astype(_ZERO_DTYPE),
        )
        wide = self.spread(scale), None if zero is None else self.spread(zero)
        return self.format.encode(x, *wide), scale, zero

    def spread(self, small: jax.Array) -> jax.Array:
        """Scales or zero points `[B, KH, ., .]` of units as float32, one for each number."""
        rows, columns = self.unit
        b, heads, n, m = small.shape
        wide = small.astype(jnp.float32)[:, :, :, None, :, None]
        wide = jnp.broadcast_to(wide, (b, heads, n, rows, m, columns))
        return wide.reshape(b, heads, n * rows, m * columns)

    def decoded_planes(self, codes: jax.Array, scale: jax.Array, zero: Any) -> list[jax.Array]:
        """The values that codes of whole blocks stand for, every `planes`-th channel each."""
        planes = self.format.decode_planes(codes)
        scale, zero = self.spread(scale), None if zero is None else self.spread(zero)
        step = len(planes)
        if zero is not None:
            planes = [plane - zero[..., p::step] for p, plane in enumerate(planes)]
        return [plane * scale[..., p::step] for p, plane in enumerate(planes)]

    def decoded(self, codes: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
        """The same, `[B, KH, ., D]`."""
        return join_planes(self.decoded_planes(codes, scale, zero))

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values `[B, KH, S, D]` as the next token sees them: the open block exact."""
        b, heads, slots, d = self.shape
        whole = jnp.zeros((b, heads, -(-slots // BLOCK) * BLOCK, d), jnp.float32)
        if self.full:
            rows = self.full // self.unit[0]
            small = (self.scale[:, :, :rows], None if self.zero is None else self.zero[:, :, :rows])
            whole = whole.at[:, :, : self.full].set(
                self.decoded(self.codes[:, :, : self.full], *small)
            )
        into = functools.partial(lax.dynamic_update_slice_in_dim, axis=1)
        whole = jax.vmap(into)(whole, self.open.astype(jnp.float32), self.block * BLOCK)
        return whole[:, :, :slots].astype(dtype)


OTHER_TENSORS["block"] = BlockTensor
