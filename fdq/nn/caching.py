"""What layers that write to a KV cache have in common, whatever they store in it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.cache.kv_cache import LayerScales
from fdq.nn.parameters import CacheScale, value


class Caching(nnx.Module):
    """Holds the calibrated scales of a KV cache's static formats, and an observer.

    Attributes:
      k_cache_scale, v_cache_scale, k_cache_zero, v_cache_zero, k_cache_mean: what a KV cache of a
        static format, or of one that is centered, is made with, see `fdq.cache.LayerScales`; None
        without calibration. They travel with the model and are not read by the layer itself.
      kv_observer: called with the two halves that a cache would store, `[B, T, heads, channels]`
        each; for calibration.
    """

    def __init__(self):
        self.k_cache_scale: Any = nnx.data(None)
        self.v_cache_scale: Any = nnx.data(None)
        self.k_cache_zero: Any = nnx.data(None)
        self.v_cache_zero: Any = nnx.data(None)
        self.k_cache_mean: Any = nnx.data(None)
        self.kv_observer: Any = nnx.data(None)

    @property
    def cache_scales(self) -> LayerScales | None:
        """The calibrated scales of what this layer stores; None without calibration."""
        if self.k_cache_scale is None and self.k_cache_mean is None:
            return None
        held = (self.k_cache_scale, self.v_cache_scale, self.k_cache_zero, self.v_cache_zero)
        k, v, k_zero, v_zero = map(value, held)
        return LayerScales(k=k, v=v, k_zero=k_zero, v_zero=v_zero, k_mean=value(self.k_cache_mean))

    def set_cache_scales(self, scales: LayerScales | None) -> None:
        """Keeps the scales of a static cache format, or abstract ones; None takes them away."""

        def kept(array: Any) -> Any:
            if array is not None and not isinstance(array, jax.ShapeDtypeStruct):
                array = jnp.asarray(array)
            return nnx.data(None if array is None else CacheScale(array))

        scales = LayerScales(k=None, v=None) if scales is None else scales
        self.k_cache_scale, self.k_cache_zero = kept(scales.k), kept(scales.k_zero)
        self.v_cache_scale, self.v_cache_zero = kept(scales.v), kept(scales.v_zero)
        self.k_cache_mean = kept(scales.k_mean)
