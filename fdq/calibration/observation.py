"""Statistics of activations, keys and values over sample tokens, for static scales and searches.

The model is cloned, its linear modules are wrapped in observers, and the clone runs under
`jax.jit`; the model that was passed in is not touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import nn
from fdq.cache.cache_tensor import format_of
from fdq.cache.kv_cache import LayerScales, parse_format
from fdq.nn.parameters import value
from fdq.schemes.scheme import ActivationSpec, CacheSpec

_SMALLEST = 1e-10  # as in fdq.ops: a channel that was never active gets a scale that is not zero


class Observed(nnx.Variable):
    """A running statistic; float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValueRange:
    """Smallest and largest key and value seen by one layer, each `[kv_heads, head_dim]`."""

    k_min: np.ndarray
    k_max: np.ndarray
    v_min: np.ndarray
    v_max: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `calibrate` saw.

    Attributes:
      absmax: by path of the kernel (`layers.0.mlp.down_proj.kernel`), the largest |x| of each
        input channel: `[K]`, or `[layers, K]` for scan-stacked kernels; float32.
      mean_square: the mean of x^2 of each input channel, same keys and shapes: the `importance`
        of a scale search. Experts share one row.
      cache: of each attention layer in order the range of what a KV cache would store; empty for
        models that are not made of `fdq.nn.Attention`.
      tokens: how many tokens were seen.
    """

    absmax: dict[str, np.ndarray]
    mean_square: dict[str, np.ndarray]
    cache: tuple[KeyValueRange, ...]
    tokens: int

    @property
    def importance(self) -> dict[str, np.ndarray]:
        """Weight of each input channel's error in the output's error: its mean square."""
        return self.mean_square

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
          spec: a static CacheSpec, per `channel` or `head`.

        Raises:
          ValueError: a dynamic format, or a model whose attention was not observed.
        """
        parsed = parse_format(spec)
        if parsed is None or parsed.dynamic:
            raise ValueError(f"KV cache format {spec} needs no calibrated scales")
        if not self.cache:
            raise ValueError("no keys and values were observed: the model has no fdq.nn.Attention")
        layers = []
        for seen in self.cache:
            k, k_zero = _scale(seen.k_min, seen.k_max, parsed)
            v, v_zero = _scale(seen.v_min, seen.v_max, parsed)
            layers.append(LayerScales(k=k, v=v, k_zero=k_zero, v_zero=v_zero))
        return layers


def _scale(low: np.ndarray, high: np.ndarray, spec: CacheSpec) -> tuple[Any, Any]:
    """Scale and zero point, `[kv_heads, head_dim]` or `[kv_heads, 1]`."""
    if spec.granularity == "head":
        low, high = low.min(-1, keepdims=True), high.max(-1, keepdims=True)
    scale, zero = format_of(spec).fit(jnp.asarray(low), jnp.asarray(high))
    return np.asarray(scale), None if zero is None else np.asarray(zero).astype(np.uint8)


class _InputObserver(nnx.Module):
    """Stands where a linear module stood, and looks at its input on the way."""

    def __init__(self, inner: Any, contracted: int, shape: tuple[int, ...]):
        self.inner = inner
        self.contracted = contracted
        self.absmax = Observed(jnp.zeros(shape, jnp.float32))
        self.total = Observed(jnp.zeros(shape, jnp.float32))
        self.count = Observed(jnp.zeros(shape[:-1], jnp.float32))

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        rows = x.reshape(-1, int(np.prod(x.shape[x.ndim - self.contracted :])))
        rows = jax.lax.stop_gradient(rows).astype(jnp.float32)
        absmax, total, count = (v.get_value() for v in (self.absmax, self.total, self.count))
        self.absmax.set_value(jnp.maximum(absmax, jnp.abs(rows).max(axis=0)))
        self.total.set_value(total + jnp.square(rows).sum(axis=0))
        self.count.set_value(count + rows.shape[0])
        return self.inner(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # What the surrounding module asks of the layer (its kernel, its sizes) it still gets.
        if name.startswith("_") or "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["inner"], name)


class _CacheObserver(nnx.Module):
    """The range of keys and values, per KV head and channel."""

    def __init__(self, heads: int, head_dim: int):
        for name in ("k_min", "v_min"):
            setattr(self, name, Observed(jnp.full((heads, head_dim), jnp.inf, jnp.float32)))
        for name in ("k_max", "v_max"):
            setattr(self, name, Observed(jnp.full((heads, head_dim), -jnp.inf, jnp.float32)))

    def __call__(self, k: jax.Array, v: jax.Array) -> None:
        for name, x in (("k", k), ("v", v)):
            x = x.astype(jnp.float32)
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            low.set_value(jnp.minimum(low.get_value(), x.min(axis=(0, 1))))
            high.set_value(jnp.maximum(high.get_value(), x.max(axis=(0, 1))))


def calibrate(
    model: nnx.Module,
    tokens: Any,
    *,
    batch_size: int = 8,
    forward: Callable[[Any, jax.Array], Any] | None = None,
) -> Calibration:
    """Runs the model over sample tokens and records what its linear layers are fed.

    Observed are `fdq.nn.Linear`, the experts of `fdq.nn.Experts`, `nnx.Linear`, scan-stacked ones
    too, `nnx.LinearGeneral` that contracts its last axes, and the keys and values of
    `fdq.nn.Attention`.

    Args:
      model: any NNX module.
      tokens: `[N, L]` inputs, run `batch_size` rows at a time, or an iterable of batches. For a
        model that takes something else than tokens, batches of that.
      batch_size: rows per call.
      forward: `(model, batch) -> anything`; `model(batch)` where not given.

    Raises:
      ValueError: no tokens, or a model that calls no linear layer.
    """
    run = forward or (lambda module, batch: module(batch))  # pyright: ignore[reportCallIssue]
    clone = nnx.clone(model)
    observers, attentions = _insert_observers(clone)
    graphdef, observed, rest = nnx.split(clone, Observed, ...)

    @jax.jit
    def step(observed, rest, batch):
        module = nnx.merge(graphdef, observed, rest)
        run(module, batch)
        return nnx.state(module, Observed)

    seen = 0
    for batch in _batches(tokens, batch_size):
        observed = step(observed, rest, batch)
        seen += int(np.prod(batch.shape[:2]))
    if not seen:
        raise ValueError("calibration needs sample tokens, got none")
    nnx.update(clone, observed)
    absmax, mean_square = {}, {}
    for path, observer in observers.items():
        count = np.asarray(value(observer.count))
        if not count.any():
            continue  # Never called: nothing is known about it.
        absmax[path] = np.asarray(value(observer.absmax))
        mean_square[path] = np.asarray(value(observer.total)) / count[..., None]
    if not absmax:
        raise ValueError("no linear layer was called: there is nothing to calibrate")
    ranges = tuple(
        KeyValueRange(
            **{name: np.asarray(value(getattr(observer, name))) for name in _RANGE_FIELDS}
        )
        for observer in attentions
    )
    return Calibration(absmax=absmax, mean_square=mean_square, cache=ranges, tokens=seen)


_RANGE_FIELDS = tuple(field.name for field in dataclasses.fields(KeyValueRange))


def _batches(tokens: Any, batch_size: int) -> Iterable[jax.Array]:
    if hasattr(tokens, "shape"):
        if len(tokens.shape) < 2:
            raise ValueError(f"calibration tokens: got shape {tokens.shape}, expected [N, L]")
        starts = range(0, tokens.shape[0], batch_size)
        return (jnp.asarray(tokens[start : start + batch_size]) for start in starts)
    return (jnp.asarray(batch) for batch in tokens)


def _insert_observers(
    root: nnx.Module,
) -> tuple[dict[str, _InputObserver], list[_CacheObserver]]:
    """Wraps, in place, each linear module wherever it is referred to."""
    nodes = [(path, node) for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)]
    wrapped: dict[int, _InputObserver] = {}
    observers: dict[str, _InputObserver] = {}
    attentions = []
    for path, node in sorted(nodes, key=lambda item: _order(item[0])):
        if isinstance(node, nn.Attention):
            node.kv_observer = _CacheObserver(node.num_kv_heads, node.head_dim)
            attentions.append(node.kv_observer)
        observer = _observer_of(node)
        if observer is not None and path:
            wrapped[id(node)] = observer
            observers[".".join(map(str, (*path, "kernel")))] = observer
    for _, node in nodes:
        if isinstance(node, nnx.List):
            for index, child in enumerate(node):
                if id(child) in wrapped:
                    node[index] = wrapped[id(child)]
        else:
            for name, child in list(vars(node).items()):
                if id(child) in wrapped:
                    setattr(node, name, wrapped[id(child)])
    return observers, attentions


def _order(path: tuple[Any, ...]) -> tuple[tuple[bool, Any], ...]:
    """Sorts list indices as numbers, so that layer 10 comes after layer 9."""
    return tuple((isinstance(key, str), key) for key in path)


def _observer_of(node: Any) -> _InputObserver | None:
    if isinstance(node, nn.Linear | nnx.Linear):
        shape = tuple(node.kernel.shape)
        return _InputObserver(node, 1, shape[:-1])
    if isinstance(node, nn.ExpertLinear):
        shape = tuple(node.kernel.shape)
        return _InputObserver(node, 1, (*shape[:-3], shape[-2]))
    if isinstance(node, nnx.LinearGeneral):
        axes = node.axis if isinstance(node.axis, tuple) else (node.axis,)
        if node.batch_axis or sorted(axes) != list(range(-len(axes), 0)):
            return None
        # A kernel that is scan-stacked has more axes than it was made with.
        features = len(node.in_features)
        outputs = len(node.out_features)
        shape = tuple(node.kernel.shape)
        lead = shape[: len(shape) - features - outputs]
        return _InputObserver(node, len(axes), (*lead, int(np.prod(node.in_features))))
    return None
