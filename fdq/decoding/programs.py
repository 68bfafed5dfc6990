"""What `prefill` and `decode` compile: one program for a chunk of tokens, on one device or many."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdq.cache.kv_cache import KVCache
from fdq.decoding.functional import (
    by_length,
    by_ring,
    feed,
    next_logits,
    placement_of,
    whole_logits,
    window_start,
)
from fdq.decoding.sampling import Sampling, sample
from fdq.decoding.state import DecodeState
from fdq.nn.latent_attention import LatentAttention
from fdq.nn.parameters import Template, bind
from fdq.ops.placement import mesh_of, on_current_mesh

LogitsProcessor = Callable[[jax.Array, DecodeState], jax.Array]
"""`(logits [B, V] float32, state) -> logits [B, V]`, pure; -inf rules a token out.

A sequence that it leaves no token (all -inf, or a NaN) is finished, without a further one.
"""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def extend(
    template: Template,
    params: Any,
    tokens: jax.Array,
    cache: KVCache,
    start: jax.Array,
    lengths: jax.Array | None = None,
) -> KVCache:
    """Writes the keys and values of `tokens [B, T]` from slot `start` on."""
    model = bind(template, params)
    if placement_of(model) is not None:
        rows = tokens, cache, lengths
        return placement_of(model).run(model, _extended, rows, whole=(start,), out=(1,))
    return _extended(model, tokens, cache, lengths, start)


def _extended(model: Any, tokens: Any, cache: KVCache, lengths: Any, start: Any) -> KVCache:
    known = {} if lengths is None else by_length(model, lengths) | by_ring(cache, lengths)
    return model.extend(tokens, cache.ending(lengths), start, **known)[1].ending(None)


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)
def extend_from(
    template: Template,
    params: Any,
    tokens: jax.Array,
    cache: KVCache,
    start: jax.Array,
    count: int,
    lengths: jax.Array,
):
    """Writes `count` slots of each sequence, from `start [B]` on, from `tokens [B, capacity]`."""
    start = window_start(start, count, tokens.shape[1])
    model, rows = bind(template, params), (tokens, cache, start, lengths)
    if placement_of(model) is not None:
        return placement_of(model).run(model, _fed, rows, settings=(count,), out=(1,))
    return _fed(model, *rows, count)


def _fed(model: Any, tokens: Any, cache: KVCache, start: Any, lengths: Any, count: int) -> KVCache:
    cache = cache.ending(lengths)
    return feed(model, tokens, cache, start, count, lengths, lengths)[1].ending(None)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("steps", "a_trip"), donate_argnums=2)
def decode(
    template: Template,
    params: Any,
    state: DecodeState,
    stop_tokens: jax.Array,
    sampling: Sampling | None = None,
    processor: Any = None,
    count: jax.Array | None = None,
    *,
    steps: int | None = None,
    a_trip: int = 1,
) -> DecodeState:
    """`steps` steps, or `count` of them where that is None, `a_trip` of them in an inner loop."""
    model, rows = bind(template, params), (state, stop_tokens, sampling)
    if placement_of(model) is None:
        with mesh_of(params, state):
            return _steps(model, *rows, processor, count, steps, a_trip)
    whole, settings = (processor, count), (steps, a_trip)
    return placement_of(model).run(model, _steps, rows, whole=whole, settings=settings, out=(0,))


def _steps(
    model: Any,
    state: DecodeState,
    stop_tokens: jax.Array,
    sampling: Sampling | None,
    processor: Any,
    count: jax.Array | None,
    steps: int | None,
    a_trip: int,
) -> DecodeState:
    def body(state: DecodeState) -> DecodeState:
        logits, state = next_logits(model, on_current_mesh(state))
        axes = getattr(model, "vocabulary_axes", ())
        if processor is not None or state.logprobs is not None:
            logits, axes = whole_logits(model, logits), ()
        scores = logits
        if processor is not None:
            with jax.named_scope("logits_processor"):
                scores = _processed(processor, logits, state)
                # False for NaN too: no token can follow.
                some = jnp.max(scores, axis=-1) > -jnp.inf
            state = dataclasses.replace(state, finished=state.finished | ~some)
        with jax.named_scope("sampling"):
            drawn = sample(scores, state.keys(), sampling, axes)
        with jax.named_scope("push"):
            return state.push(drawn, stop_tokens, logits=logits)

    for _, module in nnx.iter_modules(model):
        if isinstance(module, LatentAttention):
            module.settle(jnp.dtype(model.config.dtype))
    if steps is not None:
        return jax.lax.scan(lambda state, _: (body(state), None), state, None, length=steps)[0]
    assert count is not None
    if a_trip == 1:
        return jax.lax.fori_loop(0, count, lambda _, state: body(state), state)

    def counted(state: DecodeState, at: jax.Array) -> tuple[DecodeState, None]:
        """One step, which counts for nothing after the last one that was asked for."""
        live = at < count
        new = body(dataclasses.replace(state, finished=state.finished | ~live))
        length = jnp.where(live, new.cache.length, state.cache.length)
        return dataclasses.replace(
            new,
            finished=jnp.where(live, new.finished, state.finished),
            cache=dataclasses.replace(new.cache, length=length),
        ), None

    def trip(i: jax.Array, state: DecodeState) -> DecodeState:
        return jax.lax.scan(counted, state, i * a_trip + jnp.arange(a_trip, dtype=jnp.int32))[0]

    return jax.lax.fori_loop(0, (count + (a_trip - 1)) // a_trip, trip, state)


def _processed(processor: LogitsProcessor, logits: jax.Array, state: DecodeState) -> jax.Array:
    scores = processor(logits, state)
    if jnp.shape(scores) != logits.shape:
        raise ValueError(
            f"logits_processor: expected logits of shape {logits.shape}, found {jnp.shape(scores)}."
        )
    return scores
