"""The KV cache: a pytree of codes and scales that a decode loop carries and updates in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq import ops
from fdq.ops.explicit_axes import in_auto_axes, spec_entry
from fdq.schemes.scheme import CacheSpec

# float8 is held as its bits: XLA on CPU widens a float8 array to float16 to update one row of it.
_CODE_DTYPES = {"int8": jnp.int8, "float8_e4m3": jnp.uint8, "int4": jnp.uint8}


def parse_format(name: str | CacheSpec | None) -> CacheSpec | None:
    """The spec of a cache format's name: `C16`, `C8`, `Cfp8`, `C4`, `C8-kvchannel` ...

    Raises:
      ValueError: an unknown name; the message points at what could not be read.
    """
    return CacheSpec.parse(name) if isinstance(name, str) else name


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerScales:
    """Calibrated scales of one layer, for the static formats.

    Attributes:
      k, v: `[kv_heads, head_dim]` (granularity `channel`) or `[kv_heads, 1]` (`head`), float32.
      k_zero, v_zero: zero points of the same shape; only where the spec has them.
    """

    k: Any
    v: Any
    k_zero: Any = None
    v_zero: Any = None


def abstract_scales(config: Any, spec: CacheSpec) -> list[LayerScales]:
    """The scales that a static spec needs, as ShapeDtypeStructs; one `LayerScales` a layer."""
    width = config.head_dim if spec.granularity == "channel" else 1
    scale = jax.ShapeDtypeStruct((config.num_kv_heads, width), ops.CACHE_SCALE_DTYPE)
    zero = jax.ShapeDtypeStruct(scale.shape, jnp.uint8) if spec.zero_point else None
    layer = LayerScales(k=scale, v=scale, k_zero=zero, v_zero=zero)
    return [layer] * config.num_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer: `value = (code - zero) * scale`.

    Slots at and after `length` hold nothing: attention never reads them. A cache that is given
    to `fdq.prefill` or `fdq.decode` is donated: use the one that comes back.

    Attributes:
      k, v: one array a layer, `[batch, kv_heads, slots, head_dim]`; int4 is packed along head_dim
        (even channel in the low nibble), so its last axis is `head_dim / 2` bytes; float8 is
        held as its bits, uint8.
      k_scale, v_scale: one array a layer: `[batch, kv_heads, slots]` when dynamic,
        `[kv_heads, head_dim or 1]` when static; None without quantization.
      k_zero, v_zero: of the shape of the scales, uint8; None without zero points.
      length: `[batch]` int32, how many tokens each sequence has in the cache.
      spec: what the codes are; None means floats (C16).
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]
    k_scale: tuple[Any, ...] | None
    v_scale: tuple[Any, ...] | None
    k_zero: tuple[Any, ...] | None
    v_zero: tuple[Any, ...] | None
    length: Any
    spec: CacheSpec | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls,
        config: Any,
        batch: int,
        max_length: int,
        format: str | CacheSpec | None = "C16",
        *,
        scales: Sequence[LayerScales] | None = None,
        dtype: Any = None,
    ) -> KVCache:
        """An empty cache.

        Args:
          config: anything with `num_layers`, `num_kv_heads`, `head_dim` and `dtype`, such as
            `model.config`.
          batch: number of sequences.
          max_length: slots, in tokens.
          format: `C16`, `C8`, `Cfp8`, `C4`, one of the static kinds, or a CacheSpec.
          scales: one `LayerScales` a layer, from `Calibration.cache_scales`; static formats only.
          dtype: of C16; by default `config.dtype`.

        Raises:
          ValueError: an unknown format; scales missing, or given to a dynamic format.
        """
        spec = parse_format(format)
        layers = range(config.num_layers)
        static = spec is not None and not spec.dynamic
        if spec is not None and static and scales is None:
            raise ValueError(
                f"KV cache {spec.format} with static scales per {spec.granularity} needs scales: "
                "pass scales=calibration.cache_scales(spec), or use a dynamic format such as C8"
            )
        if scales is not None and not static:
            raise ValueError(f"KV cache format {format} computes its scales; got scales as well")
        if scales is not None and len(scales) != config.num_layers:
            raise ValueError(f"got scales of {len(scales)} layers, expected {config.num_layers}")
        width = config.head_dim
        code_dtype = jnp.dtype(dtype or config.dtype)
        if spec is not None:
            code_dtype = _CODE_DTYPES[spec.format]
            if spec.format == "int4":
                if width % 2:
                    raise ValueError(f"int4 KV cache needs an even head_dim, got {width}")
                width //= 2
        shape = (batch, config.num_kv_heads, max_length, width)

        def codes():
            return tuple(jnp.zeros(shape, code_dtype) for _ in layers)

        def small(name: str, dtype: Any):
            if spec is None or (name.endswith("zero") and not spec.zero_point):
                return None
            if scales is None:
                return tuple(jnp.zeros(shape[:-1], dtype) for _ in layers)
            # Copies: the cache is donated, and the caller's scales must survive that.
            return tuple(_static_scale(getattr(s, name), name, config, dtype) for s in scales)

        return cls(
            k=codes(),
            v=codes(),
            k_scale=small("k" if scales is not None else "k_scale", ops.CACHE_SCALE_DTYPE),
            v_scale=small("v" if scales is not None else "v_scale", ops.CACHE_SCALE_DTYPE),
            k_zero=small("k_zero", jnp.uint8),
            v_zero=small("v_zero", jnp.uint8),
            length=jnp.zeros((batch,), jnp.int32),
            spec=spec,
        )

    @property
    def max_length(self) -> int:
        """Slots per sequence."""
        return self.k[0].shape[-2]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.k[0].shape[-4]

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points; also of an abstract cache."""
        return sum(
            int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(dataclasses.replace(self, length=None))
        )

    def update(self, layer: int, k: jax.Array, v: jax.Array, start: jax.Array) -> KVCache:
        """The cache with T new positions of one layer written to it; `length` stays.

        Args:
          layer: which layer.
          k: [B, T, kv_heads, head_dim], after the rotation.
          v: as `k`.
          start: first slot: a scalar for all sequences, or [B] int32. `start + T` must not
            exceed `max_length`: the write would be moved back over older slots.
        """
        fields: dict[str, Any] = {}
        for name, x in (("k", k), ("v", v)):
            x = jnp.swapaxes(x, 1, 2)
            written = self._quantize(name, layer, x)
            for field, new in written.items():
                arrays = getattr(self, field)
                if new.dtype == jnp.float8_e4m3fn:
                    new = jax.lax.bitcast_convert_type(new, jnp.uint8)
                updated = _write(arrays[layer], new.astype(arrays[layer].dtype), start)
                fields[field] = (*arrays[:layer], updated, *arrays[layer + 1 :])
        return dataclasses.replace(self, **fields)

    def append(
        self,
        layer: int,
        qkv: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        start: jax.Array,
        **options: Any,
    ) -> tuple[jax.Array, KVCache] | None:
        """Rotation and `update` of one token per sequence in one launch, where a kernel does it.

        Args:
          layer: which layer.
          qkv: float32 partial sums `[split, B, (heads + 2 kv_heads) D]`.
          angles: cosines and sines of the token's position, `[B, D / 2]` each.
          start: the slot to write: a scalar or [B] int32.
          **options: see `fdq.ops.append_token`.

        Returns:
          The rotated queries [B, heads, D] and the cache; None where there is no kernel.
        """
        batch = qkv.shape[1]
        names = ("k", "v", "k_scale", "v_scale", "k_zero", "v_zero")
        old = {name: getattr(self, name) for name in names}
        out = ops.append_token(
            qkv,
            angles,
            jnp.broadcast_to(start, (batch,)).astype(jnp.int32),
            {name: None if a is None else a[layer] for name, a in old.items()},
            cache_format=self.spec,
            head_dim=angles[0].shape[-1] * 2,
            **options,
        )
        if out is None:
            return None
        q, new = out
        fields = {
            name: (*arrays[:layer], new[name], *arrays[layer + 1 :])
            for name, arrays in old.items()
            if arrays is not None
        }
        return q, dataclasses.replace(self, **fields)

    def attend(self, layer: int, q: jax.Array, start: jax.Array) -> jax.Array:
        """Attention of `q [B, T, heads, D]`, at slots `start ...`, to all slots up to its own."""
        b, t = q.shape[:2]
        offset = jnp.broadcast_to(start, (b,)).astype(jnp.int32)

        def pick(arrays):
            return None if arrays is None else arrays[layer]

        return ops.attention(
            q,
            self.k[layer],
            self.v[layer],
            lengths=offset + t,
            offset=offset,
            k_scale=pick(self.k_scale),
            v_scale=pick(self.v_scale),
            k_zero=pick(self.k_zero),
            v_zero=pick(self.v_zero),
            cache_format=self.spec,
        )

    def _quantize(self, name: str, layer: int, x: jax.Array) -> dict[str, jax.Array]:
        """The arrays to write for `x [B, KH, T, D]`, by field name."""
        if self.spec is None:
            return {name: x}
        if self.spec.dynamic:
            codes, scale, zero = ops.quantize_cache(x, self.spec)
            written = {name: codes, f"{name}_scale": scale}
            return written if zero is None else {**written, f"{name}_zero": zero}
        scale = getattr(self, f"{name}_scale")[layer]
        zeros = getattr(self, f"{name}_zero")
        zero = None if zeros is None else zeros[layer]
        codes, _, _ = ops.quantize_cache(x, self.spec, scale=scale, zero=zero)
        return {name: codes}


def _static_scale(array: Any, name: str, config: Any, dtype: Any) -> jax.Array:
    shape = None if array is None else jnp.shape(array)
    heads, d = config.num_kv_heads, config.head_dim
    if shape not in ((heads, d), (heads, 1)):
        raise ValueError(
            f"static KV scales {name}: got shape {shape}, expected {(heads, d)} or {(heads, 1)}"
        )
    return jnp.array(array, dtype, copy=True)


def _write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`old [B, KH, S, ...]` with `new [B, KH, T, ...]` at slots `start` (scalar or [B])."""
    rest = (0,) * (old.ndim - 3)

    def write(old, new, start):
        if jnp.ndim(start) == 0:
            return jax.lax.dynamic_update_slice(old, new, (0, 0, start, *rest))
        if old.shape[0] == 1:
            return jax.lax.dynamic_update_slice(old, new, (0, 0, start[0], *rest))
        # One scatter with a window per sequence: in place, whatever the batch.
        return jax.vmap(lambda o, n, s: jax.lax.dynamic_update_slice(o, n, (0, s, *rest)))(
            old, new, start
        )

    # On Explicit mesh axes the cache stays as it is sharded, whatever the new slots are.
    return in_auto_axes(
        write, old, new, start, result=lambda: [spec_entry(old, i) for i in range(old.ndim)]
    )
