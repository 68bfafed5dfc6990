"""Statistics of activations, keys and values over sample tokens, by observers in a clone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdq import nn
from fdq.calibration.moments import drawn_loss
from fdq.calibration.observers import (
    REAL,
    CacheObserver,
    InputObserver,
    LayerSizes,
    Observed,
    ObservedLayer,
    Tap,
)
from fdq.calibration.statistics import STATISTICS, Calibration
from fdq.nn.embedding import check_vocabulary
from fdq.nn.parameters import value


def calibrate(
    model: nnx.Module,
    tokens: Any,
    *,
    lengths: Any = None,
    batch_size: int = 8,
    forward: Callable[[Any, jax.Array], Any] | None = None,
    moments: bool = False,
    output_moments: bool = False,
    moments_of: Callable[[str], bool] | None = None,
    loss: Callable[[Any, jax.Array], jax.Array] | None = None,
    seed: int = 0,
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
      moments: also gathers E[x xᵀ] of the input of each linear layer and of each expert, whose rows
        are multiplied by what the router gives their outputs: what `method="gptq"` needs. An expert
        that saw few tokens borrows from its layer (`Calibration.rarely_picked` names those).
      output_moments: also gathers E[g gᵀ], g the gradient of a loss at each layer's output, by a
        backward pass: what `method="gptq2"` needs beside `moments`, which it implies.
      moments_of: whether to gather second moments of the kernel at a path; by default of all but a
        head (`lm_head.kernel`), whose logits are as many as the vocabulary.
      loss: `(what forward returns, batch) -> scalar`, a sum over tokens, for `output_moments`. By
        default the cross entropy of labels that are drawn from the model's own predictions `[B, L,
        V]` (logits): then E[g gᵀ] is that of the KL divergence between a model and its neighbours.
      seed: of these labels.

    Raises:
      TypeError: no NNX module, text in place of tokens, or `output_moments` without `loss` of a
        model that returns no logits.
      ValueError: no tokens, tokens outside of the vocabulary that the model's config names,
        activations that are NaN or infinite (the message names the layer), a model that calls no
        linear layer, or `lengths` that are not one a row, from 0 to L, or that a layer's input has
        no rows for.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"calibrate: expected a Flax NNX module, found a {type(model).__name__}. Trees of "
            "parameters have no layers to watch."
        )
    if getattr(model, "placement", None) is not None:
        raise ValueError(
            "calibrate: the model is on a mesh: calibrate it before, or fdq.unshard it."
        )
    run = forward or (lambda module, batch: module(batch))  # pyright: ignore[reportCallIssue]
    clone = nnx.clone(model)
    inputs = moments or output_moments
    observers, attentions = _insert_observers(
        clone, inputs, output_moments, moments_of or _but_the_head
    )
    graphdef, observed, taps, rest = nnx.split(clone, Observed, Tap, ...)

    def watched(taps, observed, rest, batch, real, key):
        # Variables of this trace: those of an outer one could not be set.
        observed = jax.tree.map(lambda a: a, observed)
        module = nnx.merge(graphdef, observed, taps, rest)
        token = REAL.set(real)
        try:
            result = run(module, batch)
        finally:
            REAL.reset(token)
        scalar = None
        if output_moments:
            scalar = loss(result, batch) if loss else drawn_loss(result, batch, real, key)
        return scalar, nnx.state(module, Observed)

    @jax.jit
    def step(totals, observed, rest, batch, real, key):
        taps = jax.tree.map(jnp.zeros_like, totals)
        arguments = (taps, observed, rest, batch, real, key)
        if not output_moments:
            return totals, watched(*arguments)[1]
        found, observed = jax.grad(watched, has_aux=True)(*arguments)
        return jax.tree.map(jnp.add, totals, found), observed

    seen, totals, key = 0, taps, jax.random.key(seed)
    sample = hashlib.sha256()
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    for batch, real in _with_lengths(tokens, lengths, batch_size):
        if vocabulary is not None and jnp.issubdtype(batch.dtype, jnp.integer):
            check_vocabulary("calibrate: tokens", np.asarray(batch), vocabulary)
        _note_sample(sample, batch, real)
        key, own = jax.random.split(key)
        mask = None if real is None else jnp.asarray(real)
        totals, observed = step(totals, observed, rest, batch, mask, own)
        seen += int(np.prod(batch.shape[:2]) if real is None else real.sum())
    if not seen:
        raise ValueError("calibration needs sample tokens, got none")
    nnx.update(clone, observed)
    nnx.update(clone, totals)
    found: dict[str, Any] = {name: {} for name in (*STATISTICS, "counts")}
    for path, observer in observers.items():
        count = np.asarray(value(observer.count))
        if not count.any():
            continue  # Never called: nothing is known about it.
        for name, statistic in observer.statistics(count).items():
            if not np.isfinite(statistic).all():
                raise ValueError(
                    f"calibrate: {path}: its {name} has NaN or infinity. Check the model, the "
                    "sample and its dtype (bfloat16 reaches further than float16)."
                )
            found[name][path] = statistic
    if not found["absmax"]:
        raise ValueError("no linear layer was called: there is nothing to calibrate")
    ranges = tuple(observer.ranges() for observer in attentions)
    return Calibration(**found, cache=ranges, tokens=seen, sample=sample.hexdigest())


def _note_sample(sample: Any, batch: Any, real: np.ndarray | None) -> None:
    """Adds a batch without its padding: the same text has the same hash however it is cut."""
    host = np.asarray(batch)
    host = host.astype("<i8") if np.issubdtype(host.dtype, np.integer) else host
    sample.update((host if real is None else host[real]).tobytes())


def _but_the_head(path: str) -> bool:
    """A second moment of logits has as many rows and columns as the vocabulary has tokens."""
    return not path.startswith("lm_head.")


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


def _insert_observers(
    root: nnx.Module, inputs: bool, outputs: bool, of: Callable[[str], bool]
) -> tuple[dict[str, InputObserver], list[CacheObserver]]:
    """Gives, in place, each linear module an observer; wraps those of others that take none."""
    nodes = [(path, node) for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)]
    wrapped: dict[int, ObservedLayer] = {}
    observers: dict[str, InputObserver] = {}
    attentions = []
    for path, node in sorted(nodes, key=lambda item: _order(item[0])):
        if isinstance(node, nn.Attention | nn.LatentAttention):
            node.kv_observer = CacheObserver(*node.stored)
            attentions.append(node.kv_observer)
        layer = _layer_of(node)
        if layer is not None and path:
            name = ".".join(map(str, (*path, "kernel")))
            observer = InputObserver(layer, inputs and of(name), outputs and of(name))
            if isinstance(node, nn.Linear | nn.ExpertLinear):
                node.observer = observer
            else:
                wrapped[id(node)] = ObservedLayer(node, observer)
            observers[name] = observer
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


def _layer_of(node: Any) -> LayerSizes | None:
    if isinstance(node, nn.Linear | nnx.Linear):
        *lead, k, n = node.kernel.shape
        return LayerSizes(tuple(lead), k, n)
    if isinstance(node, nn.ExpertLinear):
        *lead, experts, k, n = node.kernel.shape
        return LayerSizes(tuple(lead), k, n, experts)
    if isinstance(node, nnx.LinearGeneral):
        axes = node.axis if isinstance(node.axis, tuple) else (node.axis,)
        if node.batch_axis or sorted(axes) != list(range(-len(axes), 0)):
            return None
        # A kernel that is scan-stacked has more axes than it was made with.
        made = len(node.out_features)
        lead = tuple(node.kernel.shape[: node.kernel.ndim - len(node.in_features) - made])
        k, n = int(np.prod(node.in_features)), int(np.prod(node.out_features))
        return LayerSizes(lead, k, n, contracted=len(axes), made=made)
    return None
