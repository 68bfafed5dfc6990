"""Statistics of activations, keys and values over sample tokens, by observers in a clone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import nn
from fdq.calibration.statistics import RANGE_FIELDS, Calibration, KeyValueRange
from fdq.nn.parameters import value


class Observed(nnx.Variable):
    """A running statistic; float32."""


class _InputObserver(nnx.Module):
    """The largest magnitude and the mean square of each input channel; called with the input."""

    def __init__(self, contracted: int, shape: tuple[int, ...]):
        self.contracted = contracted
        self.absmax = Observed(jnp.zeros(shape, jnp.float32))
        self.total = Observed(jnp.zeros(shape, jnp.float32))
        self.count = Observed(jnp.zeros(shape[:-1], jnp.float32))

    def __call__(self, x: jax.Array) -> None:
        rows = x.reshape(-1, int(np.prod(x.shape[x.ndim - self.contracted :])))
        rows = jax.lax.stop_gradient(rows).astype(jnp.float32)
        absmax, total, count = (v.get_value() for v in (self.absmax, self.total, self.count))
        self.absmax.set_value(jnp.maximum(absmax, jnp.abs(rows).max(axis=0)))
        self.total.set_value(total + jnp.square(rows).sum(axis=0))
        self.count.set_value(count + rows.shape[0])


class _Observed(nnx.Module):
    """Stands where a layer stood that takes no observer, and shows it the input on the way."""

    def __init__(self, inner: Any, observer: _InputObserver):
        self.inner, self.observer = inner, observer

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        self.observer(x)
        return self.inner(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # What the surrounding module asks of the layer (its kernel, its sizes) it still gets.
        if name.startswith("_") or "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["inner"], name)


class _CacheObserver(nnx.Module):
    """The range of keys and values, per KV head and channel."""

    def __init__(self, heads: int, head_dim: int):
        for name in ("k_min", "v_min", "k_max", "v_max"):
            start = jnp.inf if name.endswith("min") else -jnp.inf
            setattr(self, name, Observed(jnp.full((heads, head_dim), start, jnp.float32)))

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
        KeyValueRange(**{name: np.asarray(value(getattr(observer, name))) for name in RANGE_FIELDS})
        for observer in attentions
    )
    return Calibration(absmax=absmax, mean_square=mean_square, cache=ranges, tokens=seen)


def _batches(tokens: Any, batch_size: int) -> Iterable[jax.Array]:
    if hasattr(tokens, "shape"):
        if len(tokens.shape) < 2:
            raise ValueError(f"calibration tokens: got shape {tokens.shape}, expected [N, L]")
        starts = range(0, tokens.shape[0], batch_size)
        return (jnp.asarray(tokens[start : start + batch_size]) for start in starts)
    return (jnp.asarray(batch) for batch in tokens)


def _insert_observers(root: nnx.Module) -> tuple[dict[str, _InputObserver], list[_CacheObserver]]:
    """Gives, in place, each linear module an observer; wraps those of others that take none."""
    nodes = [(path, node) for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)]
    wrapped: dict[int, _Observed] = {}
    observers: dict[str, _InputObserver] = {}
    attentions = []
    for path, node in sorted(nodes, key=lambda item: _order(item[0])):
        if isinstance(node, nn.Attention):
            node.kv_observer = _CacheObserver(node.num_kv_heads, node.head_dim)
            attentions.append(node.kv_observer)
        observer = _observer_of(node)
        if observer is not None and path:
            if isinstance(node, nn.Linear | nn.ExpertLinear):
                node.observer = observer
            else:
                wrapped[id(node)] = _Observed(node, observer)
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
        return _InputObserver(1, tuple(node.kernel.shape[:-1]))
    if isinstance(node, nn.ExpertLinear):  # experts share one row
        *lead, _, rows, _ = node.kernel.shape
        return _InputObserver(1, (*lead, rows))
    if isinstance(node, nnx.LinearGeneral):
        axes = node.axis if isinstance(node.axis, tuple) else (node.axis,)
        if node.batch_axis or sorted(axes) != list(range(-len(axes), 0)):
            return None
        # A kernel that is scan-stacked has more axes than it was made with.
        own = len(node.in_features) + len(node.out_features)
        lead = tuple(node.kernel.shape[: node.kernel.ndim - own])
        return _InputObserver(len(axes), (*lead, int(np.prod(node.in_features))))
    return None
