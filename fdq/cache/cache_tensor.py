"""Keys or values of one layer as they are stored: a pytree of codes, scales and zero points."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq.cache.floating import FLOATING
from fdq.cache.format import SCALE_DTYPE, TURNED_SCALE_DTYPE, ZERO_DTYPE, CacheFormat
from fdq.cache.rotation import rotated
from fdq.schemes.kinds import CACHE_FORMATS
from fdq.schemes.scheme import CacheSpec
from pallas_kernels.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheTensor:
    """Stands for the keys or the values `[batch, kv_heads, slots, head_dim]` of one layer.

    Invariant: `value = (code - zero) * scale`; see the format for what codes are. With a transform
    that is the value of a turned head, see `spec`, after `mean` was taken away.

    Attributes:
      codes: `[batch, kv_heads, slots, width]`; width is head_dim unless the format packs channels.
      scale: float32, `[batch, kv_heads, slots]` when dynamic, `[kv_heads, head_dim]` (granularity
        `channel`) or `[kv_heads, 1]` (`head`) when static; None for floats.
      zero: zero points, uint8, of the shape of `scale`; None where the format has none.
      spec: the format and where its scales come from; None means floats (C16).
      mean: what was taken from all values of a channel, static, float32 `[kv_heads, head_dim]`;
        None for nothing.
      window: of a ring the sliding window that it serves, see `fdq.cache.ring`; None of a tensor
        that has a slot for every position.
      ends: of a ring that several tokens are being written to, [B] int32: tokens from there on are
        none that are kept. None otherwise, and then all are.
    """

    codes: Any
    scale: Any = None
    zero: Any = None
    spec: CacheSpec | None = dataclasses.field(default=None, metadata={"static": True})
    mean: Any = None
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
        mean: Any = None,
        dtype: Any = jnp.bfloat16,
    ) -> CacheTensor:
        """One without tokens, for values of `shape`, `[batch, kv_heads, slots, head_dim]`.

        `scale`, `zero` and `mean` are the calibrated ones, `dtype` is that of floats.
        """
        format = format_of(spec)
        width = format.width(shape[-1])
        codes = jnp.zeros((*shape[:-1], width), format.code_dtype or dtype)
        if spec is not None and spec.dynamic:
            scale = jnp.zeros(shape[:-1], SCALE_DTYPE)
            if spec.transform != "none":
                scale = scale.astype(TURNED_SCALE_DTYPE)
            zero = jnp.zeros(shape[:-1], ZERO_DTYPE) if format.has_zero else None
        return cls(codes, scale, zero, spec, mean)

    @property
    def format(self) -> CacheFormat:
        """The object that knows what codes are."""
        return format_of(self.spec)

    @property
    def dynamic(self) -> bool:
        """Whether scales belong to tokens, and are written along with them."""
        return self.spec is not None and self.spec.dynamic

    @property
    def rotated(self) -> bool:
        """Whether what is stored are turned heads."""
        return self.spec is not None and self.spec.transform != "none"

    @property
    def kernel(self) -> str | None:
        """What kernels call such a tensor; None where they do not read it."""
        return None if self.rotated else self.format.kernel

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

    def replace(self, **fields: Any) -> Self:
        """The same with other arrays."""
        return dataclasses.replace(self, **fields)

    def axes(self) -> Self:
        """Of each array what its axes are: b, h(eads), s(lots), d (channels), or - for neither."""
        small = "bhs" if self.dynamic else "hd"
        held = {"codes": "bhsd", "scale": small, "zero": small, "mean": "hd", "ends": "b"}
        return self.replace(**{k: axes for k, axes in held.items() if getattr(self, k) is not None})

    def settled(self) -> Self:
        """As it is kept from one call to the next."""
        return self

    def ending(self, ends: jax.Array | None) -> Self:
        """The same, where slots at and after `ends` [B] are written, if at all, with padding."""
        return self if self.window is None else self.replace(ends=ends)

    def encode(self, x: jax.Array) -> Self:
        """`x [B, KH, T, D]` as this tensor stores it: T slots, in the dtypes of its arrays."""
        one = quantize_cache(x, self.spec, **self._static()).replace(window=self.window)
        like = self.replace(ends=None)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), one, like)

    def take(self, rows: jax.Array) -> Self:
        """The sequences `rows`, [N] int32; static scales belong to all of them."""
        taken = jax.tree.map(lambda a: a[rows], self._of_sequences())
        return taken.replace(**self._copied_static())

    def insert(self, rows: jax.Array, other: CacheTensor) -> Self:
        """With the sequences of `other`, of at most as many slots, in place of `rows`."""
        mine, theirs = self._of_sequences(), other._of_sequences()
        kinds = [
            [(a.shape[1:2], a.shape[3:], a.dtype) for a in jax.tree.leaves(tensor)]
            for tensor in (mine, theirs)
        ]
        if self.spec != other.spec or kinds[0] != kinds[1]:
            raise ValueError(f"insert: expected a {self._kind()}, found a {other._kind()}.")
        slots, given = mine.codes.shape[2], theirs.codes.shape[2]
        if given > slots or (other.window is not None and slots != given):
            kind = "ring" if other.window is not None else "cache"
            raise ValueError(
                f"insert: a {kind} of {given} slots does not go into {slots} slots: make both "
                "caches with the same `spare`, and no longer one."
            )
        for name, scale in self._static().items():
            pair = (scale, getattr(other, name))
            known = not any(isinstance(a, Tracer) for a in pair)
            if known and not np.array_equal(np.asarray(pair[0]), np.asarray(pair[1])):
                raise ValueError(f"insert: the static {name} of the two caches differs.")
        theirs = theirs.replace(window=self.window)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            # All heads and channels, and the slots that there are.
            return old.at[rows, *(slice(0, n) for n in new.shape[1:])].set(new)

        return jax.tree.map(put, mine, theirs).replace(**self._copied_static())

    def _copied_static(self) -> dict[str, Any]:
        """As `_static`, for another cache: either may be donated."""
        return {name: jnp.array(a, copy=True) for name, a in self._static().items()}

    def _static(self) -> dict[str, Any]:
        """What belongs to no sequence: calibrated scales and zero points."""
        held = {} if self.dynamic else {"scale": self.scale, "zero": self.zero}
        held["mean"] = self.mean
        return {name: array for name, array in held.items() if array is not None}

    def _of_sequences(self) -> Self:
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
        values = rotated(values) if self.rotated else values
        if self.mean is not None:
            values = values + self.mean[None, :, None, :]
        return values.astype(dtype)

    def over_channels(self, small: jax.Array) -> jax.Array:
        """A scale or zero point as float32 that broadcasts to `[B, KH, S, D]`."""
        small = small.astype(jnp.float32)
        return small[..., None] if self.dynamic else small[None, :, None, :]


def format_of(spec: CacheSpec | None) -> CacheFormat:
    """The format that a spec names; that of floats for None."""
    return FLOATING if spec is None else CACHE_FORMATS[spec.format]


def quantize_cache(
    x: Float[Array, "b kh t d"],
    spec: CacheSpec | None,
    *,
    scale: Any = None,
    zero: Any = None,
    mean: Any = None,
) -> CacheTensor:
    """Keys (after the rotation) or values as codes, scales and zero points.

    Args:
      x: float `[B, KH, T, D]`.
      spec: None keeps floats.
      scale: the calibrated one of a static spec, `[KH, D]` or `[KH, 1]`; not allowed for a dynamic
        one.
      zero: likewise, where the format has zero points.
      mean: of each channel, `[KH, D]`, taken away first; of `centered` specs, of keys.

    Returns:
      T slots; static scales are those that were given.

    Raises:
      ValueError: a static spec without scales or zero points, or scales for a dynamic one.
    """
    if spec is None:
        return CacheTensor(x)
    if spec.granularity in OTHER_TENSORS:
        return OTHER_TENSORS[spec.granularity].of(x, spec)
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
    if mean is not None:
        x = x - mean.astype(jnp.float32)[None, :, None, :]
    turned = spec.transform != "none"
    x = rotated(x) if turned else x
    wide_scale, wide_zero = format.fit(*format.token_range(x))
    scale = wide_scale
    if turned:  # codes are of the scale that is kept
        scale = wide_scale.astype(TURNED_SCALE_DTYPE)
        wide_scale = scale.astype(jnp.float32)
    zero = None if wide_zero is None else wide_zero[..., 0].astype(ZERO_DTYPE)
    codes = format.encode(x, wide_scale, wide_zero)
    return CacheTensor(codes, scale[..., 0], zero, spec, mean)


OTHER_TENSORS: dict[str, Any] = {}
"""Classes beside `CacheTensor` by the granularity that they are of."""


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


def in_other_tensor(spec: CacheSpec | None) -> bool:
    """Whether a tensor of another kind stores it, which is never a ring."""
    return spec is not None and spec.granularity in OTHER_TENSORS
