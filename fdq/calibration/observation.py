"""Statistics of activations, keys and values over sample tokens, by observers in a clone."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import nn
from fdq.calibration.statistics import RANGE_FIELDS, Calibration, KeyValueRange
from fdq.nn.embedding import check_vocabulary
from fdq.nn.parameters import value

_REAL: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("real", default=None)
"""Of the batch that runs which positions `[B, L]` are no padding; None: all of them."""

# Where nothing was seen: no infinity, which jax_debug_infs would stop at.
_LARGEST = np.finfo(np.float32).max


class Observed(nnx.Variable):
    """A running statistic; float32."""


def _real_rows(x: jax.Array, leading: int) -> jax.Array | None:
    """Which of the first `leading` axes of x, as one, are of real positions: bool `[rows]`."""
    real = _REAL.get()
    if real is None:
        return None
    rows = math.prod(x.shape[:leading])
    if rows % real.size:
        raise ValueError(
            f"calibrate: a layer is fed {list(x.shape)}, which has no rows for each position of "
            f"{list(real.shape)} tokens, so lengths= cannot leave padding out. Leave out lengths, "
            "or pass batches without padding."
        )
    # Rows of a position follow each other: picks of experts, heads.
    return jnp.repeat(real.reshape(-1), rows // real.size)


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
        real, seen = _real_rows(x, x.ndim - self.contracted), jnp.float32(rows.shape[0])
        if real is not None:
            rows = jnp.where(real[:, None], rows, jnp.float32(0))
            seen = real.sum().astype(jnp.float32)
        absmax, total, count = (v.get_value() for v in (self.absmax, self.total, self.count))
        self.absmax.set_value(jnp.maximum(absmax, jnp.abs(rows).max(axis=0)))
        self.total.set_value(total + jnp.square(rows).sum(axis=0))
        self.count.set_value(count + seen)


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
    """The range of keys and values and the mean of keys, per KV head and channel."""

    def __init__(self, keys: tuple[int, int], values: tuple[int, int]):
        for name in ("k_min", "v_min", "k_max", "v_max"):
            start = _LARGEST if name.endswith("min") else -_LARGEST
            shape = keys if name.startswith("k") else values
            setattr(self, name, Observed(jnp.full(shape, start, jnp.float32)))
        self.k_total = Observed(jnp.zeros(keys, jnp.float32))
        self.k_count = Observed(jnp.zeros((), jnp.float32))

    def __call__(self, k: jax.Array, v: jax.Array) -> None:
        real = _real_rows(k, 2)
        for name, x in (("k", k), ("v", v)):
            x = x.astype(jnp.float32).reshape(-1, *x.shape[2:])
            least = most = x
            if real is not None:
                least = jnp.where(real[:, None, None], x, _LARGEST)
                most = jnp.where(real[:, None, None], x, -_LARGEST)
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            low.set_value(jnp.minimum(low.get_value(), least.min(axis=0)))
            high.set_value(jnp.maximum(high.get_value(), most.max(axis=0)))
        keys = k.astype(jnp.float32).reshape(-1, *k.shape[2:])
        seen = jnp.ones((keys.shape[0],), jnp.float32) if real is None else real.astype(jnp.float32)
        total = jnp.sum(keys * seen[:, None, None], axis=0)
        self.k_total.set_value(self.k_total.get_value() + total)
        self.k_count.set_value(self.k_count.get_value() + seen.sum())

    def ranges(self) -> KeyValueRange:
        """What was seen."""
        count = np.maximum(np.asarray(value(self.k_count)), 1)
        ends = {name: np.asarray(value(getattr(self, name))) for name in RANGE_FIELDS}
        return KeyValueRange(**ends, k_mean=np.asarray(value(self.k_total)) / count)


def calibrate(
    model: nnx.Module,
    tokens: Any,
    *,
    lengths: Any = None,
    batch_size: int = 8,
    forward: Callable[[Any, jax.Array], Any] | None = None,
) -> Calibration:
    """Runs the model over sample tokens and records what its linear layers are fed.

    Observed are `fdq.nn.Linear`, the experts of `fdq.nn.Experts`, `nnx.Linear`, scan-stacked ones
    too, `nnx.LinearGeneral` that contracts its last axes, and the keys and values of
    `fdq.nn.Attention` (the latents of `fdq.nn.LatentAttention`).

    Args:
      model: any NNX module.
      tokens: `[N, L]` inputs, run `batch_size` rows at a time, or an iterable of batches. For a
        model that takes something else than tokens, batches of that.
      lengths: `[N]` tokens of each row before its padding, which does not count then; for batches
        an iterable of those of each. By default nothing is padding.
      batch_size: rows per call.
      forward: `(model, batch) -> anything`; `model(batch)` where not given.

    Raises:
      TypeError: no NNX module, or text in place of tokens.
      ValueError: no tokens, tokens outside of the vocabulary that the model's config names, a model
        that calls no linear layer, or `lengths` that are not one a row, from 0 to L, or that a
        layer's input has no rows for.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"calibrate: expected a Flax NNX module, found a {type(model).__name__}. Trees of "
            "parameters have no layers to watch."
        )
    run = forward or (lambda module, batch: module(batch))  # pyright: ignore[reportCallIssue]
    clone = nnx.clone(model)
    observers, attentions = _insert_observers(clone)
    graphdef, observed, rest = nnx.split(clone, Observed, ...)

    @jax.jit
    def step(observed, rest, batch, real):
        module = nnx.merge(graphdef, observed, rest)
        token = _REAL.set(real)
        try:
            run(module, batch)
        finally:
            _REAL.reset(token)
        return nnx.state(module, Observed)

    seen = 0
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    for batch, real in _with_lengths(tokens, lengths, batch_size):
        if vocabulary is not None and jnp.issubdtype(batch.dtype, jnp.integer):
            check_vocabulary("calibrate: tokens", np.asarray(batch), vocabulary)
        observed = step(observed, rest, batch, None if real is None else jnp.asarray(real))
        seen += int(np.prod(batch.shape[:2]) if real is None else real.sum())
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
    ranges = tuple(observer.ranges() for observer in attentions)
    return Calibration(absmax=absmax, mean_square=mean_square, cache=ranges, tokens=seen)


def _with_lengths(
    tokens: Any, lengths: Any, batch_size: int
) -> Iterable[tuple[jax.Array, np.ndarray | None]]:
    """Batches, and which positions of each are no padding."""
    batches = _batches(tokens, batch_size)
    if lengths is None:
        yield from ((batch, None) for batch in batches)
        return
    if hasattr(tokens, "shape"):
        whole = np.asarray(lengths)
        if whole.shape != tokens.shape[:1]:
            raise ValueError(
                f"calibrate: expected lengths [{tokens.shape[0]}], one a row, found shape "
                f"{list(whole.shape)}."
            )
        lengths = (whole[i : i + batch_size] for i in range(0, len(whole), batch_size))
    for batch, given in zip(batches, lengths, strict=True):
        given = np.asarray(given)
        rows, longest = batch.shape[:2]
        fits = np.issubdtype(given.dtype, np.integer) and given.shape == (rows,)
        if not fits or (given < 0).any() or (given > longest).any():
            raise ValueError(
                f"calibrate: expected lengths of {rows} whole numbers from 0 to {longest}, found "
                f"{given.dtype} {given.tolist()}."
            )
        yield batch, np.arange(longest)[None, :] < given[:, None]


def _batches(tokens: Any, batch_size: int) -> Iterable[jax.Array]:
    if hasattr(tokens, "shape"):
        if len(tokens.shape) < 2:
            raise ValueError(f"calibration tokens: got shape {tokens.shape}, expected [N, L]")
        starts = range(0, tokens.shape[0], batch_size)
        return (jnp.asarray(tokens[start : start + batch_size]) for start in starts)
    if isinstance(tokens, str | bytes):
        raise TypeError(
            "calibrate: expected tokens, found text. Encode it first: "
            "fdq.Tokenizer.load(directory).encode(text)."
        )
    return (jnp.asarray(batch) for batch in tokens)


def _insert_observers(root: nnx.Module) -> tuple[dict[str, _InputObserver], list[_CacheObserver]]:
    """Gives, in place, each linear module an observer; wraps those of others that take none."""
    nodes = [(path, node) for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)]
    wrapped: dict[int, _Observed] = {}
    observers: dict[str, _InputObserver] = {}
    attentions = []
    for path, node in sorted(nodes, key=lambda item: _order(item[0])):
        if isinstance(node, nn.Attention | nn.LatentAttention):
            node.kv_observer = _CacheObserver(*node.stored)
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
