"""Keys or values of one layer as they are stored: a pytree of codes, scales and zero points."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq.cache.floating import FLOATING
from fdq.cache.format import SCALE_DTYPE, ZERO_DTYPE, CacheFormat
from fdq.schemes.kinds import CACHE_FORMATS
from fdq.schemes.scheme import CacheSpec
from pallas_kernels.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheTensor:
    """Stands for the keys or the values `[batch, kv_heads, slots, head_dim]` of one layer.

    Invariant: `value = (code - zero) * scale`; see the format for what codes are.

    Attributes:
      codes: `[batch, kv_heads, slots, width]`; width is head_dim unless the format packs channels.
      scale: float32, `[batch, kv_heads, slots]` when dynamic, `[kv_heads, head_dim]` (granularity
        `channel`) or `[kv_heads, 1]` (`head`) when static; None for floats.
      zero: zero points, uint8, of the shape of `scale`; None where the format has none.
      spec: the format and where its scales come from; None means floats (C16).
      window: of a ring the sliding window that it serves, see `fdq.cache.ring`; None of a tensor
        that has a slot for every position.
      ends: of a ring that several tokens are being written to, [B] int32: tokens from there on are
        none that are kept. None otherwise, and then all are.
    """

    codes: Any
    scale: Any = None
    zero: Any = None
    spec: CacheSpec | None = dataclasses.field(default=None, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    ends: Any = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int],
        spec: CacheSpec | None = None,
        *,
        scale: Any = None,
        zero: Any = None,
        dtype: Any = jnp.bfloat16,
    ) -> CacheTensor:
        """One without tokens, for values of `shape`, `[batch, kv_heads, slots, head_dim]`.

        `scale` and `zero` are the calibrated ones of a static spec, `dtype` is that of floats.
        """
        format = format_of(spec)
        width = format.width(shape[-1])
        codes = jnp.zeros((*shape[:-1], width), format.code_dtype or dtype)
        if spec is not None and spec.dynamic:
            scale = jnp.zeros(shape[:-1], SCALE_DTYPE)
            zero = jnp.zeros(shape[:-1], ZERO_DTYPE) if format.has_zero else None
        return cls(codes, scale, zero, spec)

    @property
    def format(self) -> CacheFormat:
        """The object that knows what codes are."""
        return format_of(self.spec)

    @property
    def dynamic(self) -> bool:
        """Whether scales belong to tokens, and are written along with them."""
        return self.spec is not None and self.spec.dynamic

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.format.head_dim(self.codes.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """`[batch, kv_heads, slots, head_dim]`."""
        return (*self.codes.shape[:-1], self.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points; also of an abstract tensor."""
        return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

    def replace(self, **fields: Any) -> CacheTensor:
        """The same with other arrays."""
        return dataclasses.replace(self, **fields)

    def encode(self, x: jax.Array) -> CacheTensor:
        """`x [B, KH, T, D]` as this tensor stores it: T slots, in the dtypes of its arrays."""
        one = quantize_cache(x, self.spec, **self._static()).replace(window=self.window)
        like = self.replace(ends=None)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), one, like)

    def take(self, rows: jax.Array) -> CacheTensor:
        """The sequences `rows`, [N] int32; static scales belong to all of them."""
        taken = jax.tree.map(lambda a: a[rows], self._of_sequences())
        return taken.replace(**self._copied_static())

    def insert(self, rows: jax.Array, other: CacheTensor) -> CacheTensor:
        """With the sequences of `other`, of at most as many slots, in place of `rows`."""
        mine, theirs = self._of_sequences(), other._of_sequences()
        kinds = [
            [(a.shape[1], a.shape[3:], a.dtype) for a in jax.tree.leaves(tensor)]
            for tensor in (mine, theirs)
        ]
        if self.spec != other.spec or kinds[0] != kinds[1]:
            raise ValueError(f"insert: expected a {self._kind()}, found a {other._kind()}.")
        if other.window is not None and mine.codes.shape[2] != theirs.codes.shape[2]:
            raise ValueError(
                f"insert: a ring of {theirs.codes.shape[2]} slots does not go into "
                f"{mine.codes.shape[2]} slots: make both caches with the same `spare`."
            )
        for name, scale in self._static().items():
            pair = (scale, getattr(other, name))
            known = not any(isinstance(a, Tracer) for a in pair)
            if known and not np.array_equal(np.asarray(pair[0]), np.asarray(pair[1])):
                raise ValueError(f"insert: the static {name} of the two caches differs.")
        slots = other.codes.shape[2]
        theirs = theirs.replace(window=self.window)
        put = jax.tree.map(lambda old, new: old.at[rows, :, :slots].set(new), mine, theirs)
        return put.replace(**self._copied_static())

    def _copied_static(self) -> dict[str, Any]:
        """As `_static`, for another cache: either may be donated."""
        return {name: jnp.array(a, copy=True) for name, a in self._static().items()}

    def _static(self) -> dict[str, Any]:
        """What belongs to no sequence: calibrated scales and zero points."""
        held = {} if self.dynamic else {"scale": self.scale, "zero": self.zero}
        return {name: array for name, array in held.items() if array is not None}

    def _of_sequences(self) -> CacheTensor:
        return self.replace(**dict.fromkeys(self._static()))

    def _kind(self) -> str:
        heads, width = self.codes.shape[1], self.codes.shape[-1]
        return f"{self.spec or 'C16'} cache of {heads} heads, {self.codes.dtype} x {width}"

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values `[B, KH, S, D]`."""
        values = join_planes(self.format.decode_planes(self.codes))
        if self.zero is not None:
            values = values - self.over_channels(self.zero)
        if self.scale is not None:
            values = values * self.over_channels(self.scale)
        return values.astype(dtype)

    def over_channels(self, small: jax.Array) -> jax.Array:
        """A scale or zero point as float32 that broadcasts to `[B, KH, S, D]`."""
        small = small.astype(jnp.float32)
        return small[..., None] if self.dynamic else small[None, :, None, :]


def format_of(spec: CacheSpec | None) -> CacheFormat:
    """The format that a spec names; that of floats for None."""
    return FLOATING if spec is None else CACHE_FORMATS[spec.format]


def quantize_cache(
    x: Float[Array, "b kh t d"], spec: CacheSpec | None, *, scale: Any = None, zero: Any = None
) -> CacheTensor:
    """Keys (after the rotation) or values as codes, scales and zero points.

    Args:
      x: float `[B, KH, T, D]`.
      spec: None keeps floats.
      scale: the calibrated one of a static spec, `[KH, D]` or `[KH, 1]`; not allowed for a dynamic
        one.
      zero: likewise, where the format has zero points.

    Returns:
      T slots; static scales are those that were given.

    Raises:
      ValueError: a static spec without scales or zero points, or scales for a dynamic one.
    """
    if spec is None:
        return CacheTensor(x)
    format = format_of(spec)
    if spec.dynamic == (scale is not None):
        kind = "dynamic" if spec.dynamic else "static"
        found = "one" if spec.dynamic else "None"
        expected = "no scale" if spec.dynamic else "a calibrated scale"
        raise ValueError(f"{kind} {spec.format} KV cache: expected {expected}, found {found}.")
    if not spec.dynamic and format.has_zero and zero is None:
        raise ValueError(f"static {spec.format} KV cache: expected zero points, found None.")
    x = x.astype(jnp.float32)
    if not spec.dynamic:
        made = CacheTensor(None, scale, zero, spec)
        wide_zero = None if zero is None else made.over_channels(zero)
        return made.replace(codes=format.encode(x, made.over_channels(scale), wide_zero))
    wide_scale, wide_zero = format.fit(*format.token_range(x))
    zero = None if wide_zero is None else wide_zero[..., 0].astype(ZERO_DTYPE)
    return CacheTensor(format.encode(x, wide_scale, wide_zero), wide_scale[..., 0], zero, spec)


def sample_scales(
    spec: CacheSpec | None, kv_heads: int, head_dim: int, largest: float = 4.0
) -> dict[str, Any]:
    """What `quantize_cache` needs beside numbers up to `largest`: scales of a static spec."""
    if spec is None or spec.dynamic:
        return {}
    high = jnp.full(spec.static_shape(kv_heads, head_dim), largest, SCALE_DTYPE)
    scale, zero = format_of(spec).fit(-high, high)
    return {"scale": scale, "zero": None if zero is None else zero.astype(ZERO_DTYPE)}


def join_planes(planes: list[jax.Array]) -> jax.Array:
    """Undoes taking every P-th channel: P arrays `[..., D / P]` -> `[..., D]`."""
    if len(planes) == 1:
        return planes[0]
    return jnp.stack(planes, axis=-1).reshape(*planes[0].shape[:-1], -1)
