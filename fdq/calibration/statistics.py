"""What a model's layers are fed: statistics for static scales and for quantizers."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdq.cache.cache_tensor import format_of
from fdq.cache.kv_cache import LayerScales, parse_format
from fdq.calibration import calibration_file
from fdq.schemes.scheme import ActivationSpec, CacheSpec

_SMALLEST = 1e-10  # as in fdq.ops: a channel that was never active gets a scale that is not zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValueRange:
    """Smallest and largest key and value seen by one layer, each `[kv_heads, head_dim]`.

    `k_mean` is the mean key, likewise; None in statistics of an older fdq.
    """

    k_min: np.ndarray
    k_max: np.ndarray
    v_min: np.ndarray
    v_max: np.ndarray
    k_mean: np.ndarray | None = None


RANGE_FIELDS = ("k_min", "k_max", "v_min", "v_max")
CACHE_FIELDS = (*RANGE_FIELDS, "k_mean")

STATISTICS = ("absmax", "mean_square", "input_moment", "output_moment")
"""Fields of `Calibration` that hold a statistic of each kernel's input or output channels."""

MOMENTS = STATISTICS[2:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `calibrate` saw.

    Attributes:
      absmax: by path of the kernel (`layers.0.mlp.down_proj.kernel`), the largest |x| of each
        input channel: `[K]`, or `[layers, K]` for scan-stacked kernels; float32.
      mean_square: the mean of x^2 of each input channel, same keys and shapes: what guides
        a scale search. Experts share one row.
      input_moment: the mean of x xᵀ, `[K, K]`, `[layers, K, K]` for scan-stacked kernels and
        `[experts, K, K]` for experts, whose x are multiplied by what the router gives their
        outputs; float32. Empty unless `calibrate(moments=True)`.
      output_moment: the mean of g gᵀ, g the gradient of the loss at the output, `[..., N, N]`;
        empty unless `calibrate(output_moments=True)`.
      counts: rows that each kernel, and each expert, was fed: `[]`, `[layers]`, `[experts]`.
      cache: of each attention layer in order the range of what a KV cache would store; empty for
        models that are not made of `fdq.nn.Attention`.
      tokens: how many tokens were seen.
      sample: a hash of these tokens, hexadecimal SHA-256; "" in statistics of an older fdq.
    """

    absmax: dict[str, np.ndarray]
    mean_square: dict[str, np.ndarray]
    cache: tuple[KeyValueRange, ...]
    tokens: int
    input_moment: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    output_moment: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sample: str = ""

    @property
    def rarely_picked(self) -> dict[str, dict[int, int]]:
        """By path the experts that saw fewer tokens than K, and how many: they borrowed much."""
        rare = {}
        for path, counts in self.counts.items():
            if path not in self.input_moment or counts.ndim < self.absmax[path].ndim:
                continue  # no experts, which share the rows of their layer
            least = self.input_moment[path].shape[-1]
            flat = counts.reshape(-1)
            few = {int(i): int(flat[i]) for i in np.flatnonzero(flat < least)}
            if few:
                rare[path] = few
        return rare

    @property
    def statistics(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """What quantizers may ask for, by name and then by path."""
        return {name: getattr(self, name) for name in STATISTICS}

    @property
    def importance(self) -> dict[str, np.ndarray]:
        """Weight of each input channel's error in the output's error: its mean square."""
        return self.mean_square

    @property
    def digest(self) -> str:
        """A hash of all that was seen; equal for equal statistics."""
        found = hashlib.sha256(str(self.tokens).encode())
        for name, array in sorted(self._arrays().items()):
            found.update(f"{name} {array.shape} ".encode() + np.asarray(array, "<f4").tobytes())
        return found.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the statistics to a file (by custom `.npz`), for `load` and `fdq convert`.

        Examples:
          >>> fdq.calibrate(model, tokens).save("statistics.npz")  # doctest: +SKIP
        """
        calibration_file.write(path, self._arrays(), self.tokens, self.sample)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """What `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no such file, or damaged; the message says where.
        """
        arrays, tokens, sample = calibration_file.read(path)
        fields: dict[str, dict[str, np.ndarray]] = {name: {} for name in (*STATISTICS, "counts")}
        layers: dict[int, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            layer = re.fullmatch(r"(\d+)/(\w+)", rest)
            if kind in fields and rest and _is_statistic(kind, array):
                fields[kind][rest] = array
            elif kind == "cache" and layer and layer[2] in CACHE_FIELDS and array.ndim == 2:
                layers.setdefault(int(layer[1]), {})[layer[2]] = array
            else:
                raise ValueError(f"{path}: {name!r} of shape {array.shape} is no such statistic.")
        for kind, values in fields.items():
            # Files of before have no others, and moments are not gathered of every layer.
            lacks = values.keys() - fields["absmax"].keys()
            if kind == "mean_square":
                lacks |= fields["absmax"].keys() - values.keys()
            for other in lacks:
                raise ValueError(f"{path}: {other!r} has absmax or {kind}, and not both.")
        for number, layer in enumerate(sorted(layers)):
            if layer != number or not layers[layer].keys() >= set(RANGE_FIELDS):
                raise ValueError(f"{path}: the range of keys and values of layer {number} lacks.")
        cache = tuple(KeyValueRange(**layers[layer]) for layer in sorted(layers))
        return cls(**fields, cache=cache, tokens=tokens, sample=sample)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            f"{kind}/{path}": np.asarray(array)
            for kind, values in (*self.statistics.items(), ("counts", self.counts))
            for path, array in values.items()
        }
        for number, layer in enumerate(self.cache):
            held = {name: getattr(layer, name) for name in CACHE_FIELDS}
            arrays |= {f"cache/{number}/{k}": a for k, a in held.items() if a is not None}
        return arrays

    def activation_scale(self, path: str, spec: ActivationSpec) -> jax.Array:
        """The static scale of one kernel's input: absmax / bound, float32 of shape ().

        Scan-stacked kernels get one scale a layer.

        Raises:
          ValueError: no statistics of that kernel.
        """
        if path not in self.absmax:
            raise ValueError(
                f"{path}: no calibration statistics; there are some of {sorted(self.absmax)[:4]} "
                f"and {max(0, len(self.absmax) - 4)} more"
            )
        largest = np.maximum(self.absmax[path].max(axis=-1), _SMALLEST)
        return jnp.asarray(largest / np.float32(spec.bound), jnp.float32)

    def cache_scales(self, spec: CacheSpec | str) -> list[LayerScales]:
        """Static scales of each layer for `KVCache.init(..., scales=...)`.

        Symmetric: scale = absmax / bound. With a zero point: scale = (max - min) / 15, both ends
        extended to 0, and zero = round(-min / scale).

        Args:
          spec: a static CacheSpec, per `channel` or `head`, or a `centered` one, which gets means.

        Raises:
          ValueError: a format that needs neither, a model whose attention was not observed, or
            statistics of an fdq that did not look at means.
        """
        parsed = parse_format(spec)
        if parsed is None or not parsed.calibrated:
            raise ValueError(f"KV cache format {spec} needs no calibrated scales")
        if not self.cache:
            raise ValueError("no keys and values were observed: the model has no fdq.nn.Attention")
        if parsed.dynamic:
            if any(seen.k_mean is None for seen in self.cache):
                raise ValueError(f"{parsed}: these statistics have no means of keys; make new ones")
            return [LayerScales(k=None, v=None, k_mean=seen.k_mean) for seen in self.cache]
        layers = []
        for seen in self.cache:
            k, k_zero = _scale(seen.k_min, seen.k_max, parsed)
            v, v_zero = _scale(seen.v_min, seen.v_max, parsed)
            layers.append(LayerScales(k=k, v=v, k_zero=k_zero, v_zero=v_zero))
        return layers


def _is_statistic(kind: str, array: np.ndarray) -> bool:
    """Whether an array can be such a statistic: nonnegative; moments have such a diagonal."""
    if kind not in MOMENTS:
        return (array.ndim > 0 or kind == "counts") and bool((array >= 0).all())
    square = array.ndim >= 2 and array.shape[-1] == array.shape[-2]
    return square and bool((np.diagonal(array, axis1=-2, axis2=-1) >= 0).all())


def _scale(low: np.ndarray, high: np.ndarray, spec: CacheSpec) -> tuple[Any, Any]:
    """Scale and zero point, `[kv_heads, head_dim]` or `[kv_heads, 1]`."""
    if spec.granularity == "head":
        low, high = low.min(-1, keepdims=True), high.max(-1, keepdims=True)
    scale, zero = format_of(spec).fit(jnp.asarray(low), jnp.asarray(high))
    return np.asarray(scale), None if zero is None else np.asarray(zero).astype(np.uint8)
