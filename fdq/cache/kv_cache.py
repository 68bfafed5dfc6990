"""The KV cache: a pytree of keys and values that a decode loop carries and updates in place."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from fdq.cache import limits, ring, shardings
from fdq.cache.batch_rows import batch_rows, inserted, taken
from fdq.cache.cache_tensor import OTHER_TENSORS, CacheTensor, in_other_tensor
from fdq.cache.format import SCALE_DTYPE, ZERO_DTYPE
from fdq.cache.held_scale import held_scale, what_is_calibrated
from fdq.cache.stored import Stored, on_mesh, repeated_heads, stored_by
from fdq.schemes.mesh_rules import DEFAULT, Rules
from fdq.schemes.scheme import CacheSpec

_SMALL_BYTES = 64 * 2**20
"""Caches up to this are made without asking how much memory there is."""


def parse_format(name: str | CacheSpec | None) -> CacheSpec | None:
    """The spec of a cache format's name: `C16`, `C8`, `Cfp8`, `C4`, `C8-kvchannel` ...

    Raises:
      ValueError: an unknown name; the message points at what could not be read.
      TypeError: no name at all.
    """
    if name is not None and not isinstance(name, str | CacheSpec):
        raise TypeError(f"KV cache format {name!r}: expected a name such as 'C8', or a CacheSpec.")
    return CacheSpec.parse(name) if isinstance(name, str) else name


def layer_specs(
    format: str | CacheSpec | Sequence[str | CacheSpec | None] | None, count: int
) -> list[CacheSpec | None]:
    """The spec of each of `count` layers, of a format for all or of one for each."""
    if not isinstance(format, Sequence) or isinstance(format, str):
        format = [parse_format(format)] * count
    if len(format) != count:
        raise ValueError(f"got cache formats of {len(format)} layers, expected {count}")
    return [parse_format(one) for one in format]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerScales:
    """Calibrated scales of one layer, for the static formats.

    Attributes:
      k, v: `[kv_heads, head_dim]` (granularity `channel`) or `[kv_heads, 1]` (`head`), float32.
      k_zero, v_zero: zero points of the same shape; only where the spec has them.
      k_mean: means of keys `[kv_heads, head_dim]`, float32; only of `centered` specs, which have
        none of the others.
    """

    k: Any
    v: Any
    k_zero: Any = None
    v_zero: Any = None
    k_mean: Any = None


def abstract_scales(config: Any, spec: CacheSpec) -> list[LayerScales]:
    """The scales that a static spec needs, as ShapeDtypeStructs; one `LayerScales` a layer."""

    def of(stored: Stored) -> LayerScales:
        if spec.dynamic:
            return LayerScales(k=None, v=None, k_mean=jax.ShapeDtypeStruct(stored[0], SCALE_DTYPE))
        shapes = [spec.static_shape(heads, width) for heads, width in stored]
        k, v = (jax.ShapeDtypeStruct(shape, SCALE_DTYPE) for shape in shapes)
        k_zero, v_zero = (
            jax.ShapeDtypeStruct(shape, ZERO_DTYPE) if spec.zero_point else None for shape in shapes
        )
        return LayerScales(k=k, v=v, k_zero=k_zero, v_zero=v_zero)

    return [of(stored) for stored in stored_by(config)]


class LayerCache(NamedTuple):
    """What one layer has stored: keys (after the rotation) and values.

    Latent attention stores a latent, which makes both, and the rotated channels of keys.
    """

    k: CacheTensor
    v: CacheTensor

    def settled(self) -> LayerCache:
        """As it is kept from one call to the next."""
        return LayerCache(self.k.settled(), self.v.settled())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Slots at and after `length` hold nothing: attention never reads them. A cache that is given
    to `fdq.prefill` or `fdq.decode` is donated: use the one that comes back.

    Attributes:
      layers: a pair of CacheTensors `[batch, kv_heads, slots, head_dim]` a layer; layers may
        differ in format, both halves in heads and channels, and rings have fewer slots.
      length: `[batch]` int32, how many tokens each sequence has in the cache.
      reach: `[batch]` int32, the most tokens that each ever had; None where no layer is a ring.
      positions: slots of a layer that is no ring, where there are rings; None otherwise.
    """

    layers: tuple[LayerCache, ...]
    length: Any
    reach: Any = None
    positions: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def init(
        cls,
        config: Any,
        batch: int,
        max_length: int,
        format: str | CacheSpec | Sequence[str | CacheSpec | None] | None = "C16",
        *,
        scales: Sequence[LayerScales | None] | None = None,
        dtype: Any = None,
        sharding: NamedSharding | None = None,
        spare: int = ring.SPARE,
        mesh: Any = None,
        mesh_rules: Rules | None = None,
    ) -> KVCache:
        """An empty cache.

        Args:
          config: anything with `num_layers`, `num_kv_heads`, `head_dim` and `dtype`, such as
            `model.config`; its `stored(layer)`, if there is one, is asked for heads and channels,
            its `ring_window(layer)` for the sliding window of a layer that keeps no more.
          batch: number of sequences.
          max_length: tokens; slots of all layers but those with a window, which take
            `window + 2 * spare` in multiples of 16, if that is less.
          format: `C16`, `C8`, `Cfp8`, `C4`, one of the static kinds, or a CacheSpec; or one of
            these for each layer.
          scales: one `LayerScales` a layer, from `Calibration.cache_scales`, read by the layers
            whose format is static.
          dtype: of C16; by default `config.dtype`.
          sharding: of keys and values `[batch, kv_heads, slots, head_dim]`, such as
            `NamedSharding(mesh, P("data", "tp"))`; scales and lengths follow, and a single head
            (a latent, say) is on every device. By default the default device.
          spare: tokens that may be rolled back where layers have a sliding window, and of
            `Functional.extend` at once.
          mesh: instead of a sharding, the mesh of a sharded model: heads and sequences are cut as
            the model is; of fewer KV heads than devices each is held several times.
          mesh_rules: those that the model is sharded by, see `fdq.sharding.Rules`.

        Raises:
          ValueError: an unknown format; scales missing, or given where no format is static; a
            sharding of more than four axes; a batch or a length that is no whole number; a dtype
            that holds no keys; more slots than there is memory for, with how many would fit.
            Nothing is allocated then.
        """
        batch = limits.whole("batch", batch, 0)
        max_length = limits.whole("max_length", max_length, 1)
        spare = limits.whole("spare", spare, 1)
        if not hasattr(config, "num_kv_heads"):
            hint = "; a model has one as model.config" if hasattr(config, "config") else ""
            raise TypeError(
                f"config: expected a DecoderConfig, found a {type(config).__name__}{hint}."
            )
        count = config.num_layers
        specs = layer_specs(format, count)
        if scales is not None and not any(spec and spec.calibrated for spec in specs):
            raise ValueError(f"KV cache format {format} computes its scales; got scales as well")
        if scales is not None and len(scales) != count:
            raise ValueError(f"got scales of {len(scales)} layers, expected {count}")
        stored = stored_by(config)
        if mesh is not None:
            if sharding is not None:
                raise ValueError("KV cache: expected either a sharding or a mesh, found both.")
            sharding, often = on_mesh(config, batch, mesh, mesh_rules or DEFAULT)
            stored, scales = repeated_heads(stored, scales, often)
        dtype = jnp.dtype(dtype or config.dtype)
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            raise ValueError(
                f"KV cache dtype {dtype}: expected float32, bfloat16 or float16. Fewer bits need "
                "scales: use format='C8', 'Cfp8' or 'C4'."
            )
        ask = getattr(config, "ring_window", lambda layer: None)
        windows = [ask(layer) for layer in range(count)]
        slots = [
            None if in_other_tensor(spec) else ring.ring_slots(window, spare, max_length)
            for window, spec in zip(windows, specs, strict=True)
        ]
        length = jnp.zeros((batch,), jnp.int32)
        if not isinstance(length, Tracer):
            heads = max((heads for layer in stored for heads, _ in layer), default=1)
            shards = shardings.parts(sharding, heads)
            _check_memory(batch, max_length, slots, stored, specs, scales, dtype, shards)

        def make(scales: Sequence[LayerScales | None]) -> KVCache:
            each = zip(stored, specs, scales, strict=True)
            layers = [
                _empty_layer(batch, max_length if held is None else held, *one, dtype)
                for held, one in zip(slots, each, strict=True)
            ]
            if all(held is None for held in slots):
                return cls(tuple(layers), length)
            for layer, held in enumerate(slots):
                if held is not None:
                    halves = (half.replace(window=windows[layer]) for half in layers[layer])
                    layers[layer] = LayerCache(*halves)
            return cls(tuple(layers), length, jnp.zeros_like(length), max_length)

        scales = list(scales or [None] * count)
        if sharding is None:
            return make(scales)
        specs_of = jax.eval_shape(make, scales).partition(*sharding.spec)
        where = jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), specs_of)
        return jax.jit(make, out_shardings=where)(scales)

    def partition(self, *entries: Any) -> KVCache:
        """A cache of PartitionSpecs, from the entries of `[batch, kv_heads, slots, head_dim]`."""
        layers = tuple(
            LayerCache(*(shardings.partition(half, *entries) for half in layer))
            for layer in self.layers
        )
        of_batch = PartitionSpec(*entries[:1])
        reach = None if self.reach is None else of_batch
        return dataclasses.replace(self, layers=layers, length=of_batch, reach=reach)

    def take(self, rows: Any) -> KVCache:
        """The sequences `rows`, [N] int, in this order; any may come twice, or not at all.

        Raises:
          ValueError: a row outside 0 ... B - 1, as far as values are known.
        """
        rows = batch_rows(rows, self.batch, ndim=1)
        return shardings.laid_out_like(self, taken, self, rows)

    def repeat(self, count: int) -> KVCache:
        """Each sequence `count` times, side by side: rows 0, 0, 1, 1 for a count of 2."""
        count = limits.whole("count", count, 1)
        return self.take(np.repeat(np.arange(self.batch), count))

    def insert(self, row: Any, other: KVCache) -> KVCache:
        """The cache with the sequences of `other` in place of those at `row`.

        Args:
          row: int, or [N] int where `other` has N sequences.
          other: of the same layers, formats and static scales, with at most as many slots.

        Raises:
          ValueError: rows outside of the batch or of another number than `other` has, another
            format, other static scales (as far as values are known), or more slots.
        """
        rows = jnp.atleast_1d(batch_rows(row, self.batch))
        if not isinstance(rows, Tracer) and len(set(rows.tolist())) < rows.size:
            raise ValueError(f"insert: rows {rows.tolist()} name a sequence twice.")
        if rows.shape != (other.batch,):
            raise ValueError(
                f"insert: got {rows.size} rows for a cache of {other.batch} sequences."
            )
        if other.num_layers != self.num_layers or other.max_length > self.max_length:
            raise ValueError(
                f"insert: expected a cache of {self.num_layers} layers and at most "
                f"{self.max_length} slots, found {other.num_layers} layers, {other.max_length}."
            )
        return shardings.laid_out_like(self, inserted, self, rows, other)

    def rollback(self, length: Any) -> KVCache:
        """The cache when it held `length` tokens, an int for all or [B]; nothing is copied.

        Slots at and after a sequence's length are overwritten before anybody reads them; where
        there are fewer tokens they all stay. Rings go back by `spare` tokens, counted from the most
        that a sequence ever had; in a `jax.jit` of one's own nobody checks that.

        Raises:
          ValueError: lengths that are no integers, or another number of them; lengths farther back
            than rings hold what they see, as far as values are known.
        """
        found = length if isinstance(length, Tracer) else np.asarray(length)
        if not jnp.issubdtype(found.dtype, jnp.integer) or found.shape not in ((), (self.batch,)):
            raise ValueError(
                f"rollback: expected an integer or integers of shape {(self.batch,)}, found "
                f"{found.dtype} of shape {found.shape}."
            )
        length = jnp.clip(jnp.asarray(length, jnp.int32), 0, self.length)
        if self.spare is not None:
            ring.check_rollback(length, self.reach, self.spare)
        return dataclasses.replace(self, length=length)

    def ending(self, ends: Any) -> KVCache:
        """The cache, where what is written at and after slots `ends` [B] is padding; None: none."""
        layers = tuple(LayerCache(*(t.ending(ends) for t in layer)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    @property
    def max_length(self) -> int:
        """Tokens per sequence."""
        return self.layers[0].k.codes.shape[-2] if self.positions is None else self.positions

    @property
    def spare(self) -> int | None:
        """Tokens that rings let be rolled back, or fed again; None where no layer is a ring."""
        return ring.spare_of(self.layers)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.layers[0].k.codes.shape[-4]

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points; also of an abstract cache."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


def _check_memory(
    batch: int,
    slots: int,
    rings: list[int | None],
    stored: list[Stored],
    specs: list[CacheSpec | None],
    scales: Any,
    dtype: Any,
    shards: int,
) -> None:
    """ValueError where the memory has no room for the slots; small caches are not looked at."""
    numbers = sum(math.prod(half) for layer in stored for half in layer)
    if batch * slots * numbers * dtype.itemsize < _SMALL_BYTES:
        return
    kinds = list(zip(stored, specs, strict=True))
    given = dict(zip(kinds, scales or [None] * len(specs), strict=True))

    def bytes_of(kind: tuple[Stored, CacheSpec | None], slots: int) -> int:
        made = functools.partial(_empty_layer, batch, slots, *kind, given[kind])
        return sum(tensor.nbytes for tensor in jax.eval_shape(lambda: made(dtype)))

    # A static scale is none of a slot's.
    a_slot = {kind: (bytes_of(kind, 256) - bytes_of(kind, 128)) / 128 for kind in given}
    each = [a_slot[kind] / shards for kind in kinds]
    pairs = list(zip(each, rings, strict=True))
    in_rings = sum(one * held for one, held in pairs if held is not None)
    by_slot = sum(one for one, held in pairs if held is None)
    limits.refuse_what_does_not_fit(slots, by_slot, always=in_rings)


def _empty_layer(
    batch: int,
    slots: int,
    stored: Stored,
    spec: CacheSpec | None,
    scales: LayerScales | None,
    dtype: Any,
) -> LayerCache:
    shapes = [(batch, heads, slots, width) for heads, width in stored]
    if spec is not None and in_other_tensor(spec):
        empty = OTHER_TENSORS[spec.granularity].empty
        pair = zip(shapes, (True, False), strict=True)
        return LayerCache(*(empty(shape, spec, dtype=dtype, keys=keys) for shape, keys in pair))
    if spec is None or not spec.calibrated:
        return LayerCache(*(CacheTensor.empty(shape, spec, dtype=dtype) for shape in shapes))
    if scales is None:
        raise ValueError(
            f"KV cache {spec.format} with {what_is_calibrated(spec)} needs scales: "
            "pass scales=calibration.cache_scales(spec), or use a dynamic format such as C8"
        )
    if spec.dynamic:
        mean = held_scale(scales.k_mean, "k_mean", shapes[0], SCALE_DTYPE, whole=True)
        keys = CacheTensor.empty(shapes[0], spec, mean=mean)
        return LayerCache(keys, CacheTensor.empty(shapes[1], spec))
    pair = []
    for name, shape in zip("kv", shapes, strict=True):
        given = {"scale": held_scale(getattr(scales, name), name, shape, SCALE_DTYPE)}
        if spec.zero_point:
            zero = f"{name}_zero"
            given["zero"] = held_scale(getattr(scales, zero), zero, shape, ZERO_DTYPE)
        pair.append(CacheTensor.empty(shape, spec, **given))
    return LayerCache(*pair)
