"""Prefill and the decode loop: pure functions over pytrees under one `jax.jit`.

    state = prefill(model, tokens, KVCache.init(model.config, batch=1, max_length=4096))
    state = decode(model, state, steps=64)
    state.generated()

    step, params = functional(model)         # the same, for loops of your own
    logits, state = step(params, state)      # inside your own jit, scan, vmap
    state = state.push(logits.argmax(-1))

The model is split into arrays and a hashable template at each call (milliseconds): arrays are
arguments of the compiled function, never constants, a second call with equal shapes does not
compile again, and whatever was changed in the model counts from the next call on.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq.cache.kv_cache import KVCache
from fdq.decoding import checks
from fdq.decoding.sampling import Sampling, sample
from fdq.nn.parameters import Template, bind, split

# A prompt's last chunk is padded to one of few lengths, so that few shapes are compiled.
_SMALLEST_CHUNK = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """The carry of the decode loop.

    Invariant: before a step the cache holds every known token of a sequence but the last, which
    the step feeds. A step without a `push` may be repeated: it gives the same logits.

    Attributes:
      tokens: [B, capacity] int32, prompt and generated tokens; capacity is the cache's slots.
      length: [B] int32, how many tokens are known.
      prompt_length: [B] int32, how many of them were given.
      finished: [B] bool; the tokens of a finished sequence no longer change.
      key: PRNG key. The draw at position i of row b uses `fold_in(fold_in(key, b), i)`, so it
        depends neither on the batch nor on how the steps are cut into calls.
      cache: the KV cache.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_length: jax.Array
    finished: jax.Array
    key: jax.Array
    cache: KVCache

    def last_tokens(self) -> jax.Array:
        """[B, 1] int32, the last known token of each sequence."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)

    def keys(self) -> jax.Array:
        """[B] PRNG keys for the next token of each sequence."""

        def one(row, length):
            return jax.random.fold_in(jax.random.fold_in(self.key, row), length)

        return jax.vmap(one)(jnp.arange(self.tokens.shape[0]), self.length)

    def push(self, next_token: jax.Array, stop_tokens: jax.Array | None = None) -> Self:
        """The state with one more token per sequence; finished sequences stay as they are.

        Args:
          next_token: [B] int.
          stop_tokens: [B, n] or [n] int; a sequence that gets one of its own is finished, the
            token included. -1 never matches.
        """
        b, capacity = self.tokens.shape
        next_token = next_token.astype(jnp.int32)
        at = jnp.minimum(self.length, capacity - 1)
        rows = jnp.arange(b)
        kept = jnp.where(self.finished, self.tokens[rows, at], next_token)
        length = jnp.where(self.finished, self.length, jnp.minimum(self.length + 1, capacity))
        stopped = jnp.zeros((b,), bool)
        if stop_tokens is not None and stop_tokens.size:
            stops = jnp.broadcast_to(jnp.atleast_2d(stop_tokens), (b, stop_tokens.shape[-1]))
            stopped = (stops == next_token[:, None]).any(axis=-1)
        # A full sequence is finished too: there is no slot to go on in.
        return dataclasses.replace(
            self,
            tokens=self.tokens.at[rows, at].set(kept),
            length=length,
            finished=self.finished | stopped | (length >= capacity),
        )

    def generated(self) -> list[list[int]]:
        """The generated tokens of each sequence, on the host; a stop token is the last of its."""
        tokens, lengths, starts = jax.device_get((self.tokens, self.length, self.prompt_length))
        return [
            row[start:length].tolist()
            for row, start, length in zip(tokens, starts, lengths, strict=True)
        ]


def _step(template: Template, params: Any, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    model = bind(template, params)
    start = state.length - 1
    hidden, cache = model.extend(state.last_tokens(), state.cache, start)
    cache = dataclasses.replace(cache, length=state.length)
    return model.head(hidden[:, 0]), dataclasses.replace(state, cache=cache)


def functional(model: Any) -> tuple[Callable[[Any, DecodeState], Any], Any]:
    """A pure step function and the model's arrays as a plain pytree.

    Args:
      model: a `fdq.models.Decoder`, concrete, abstract, or traced (an argument of your own jit).

    Returns:
      `(step, params)`. `step(params, state) -> (logits [B, vocab] float32, state)` feeds the last
      token of each sequence; follow it with `state.push(next_token)`. `params` are nested dicts of
      arrays and QTensors; `step` holds none of them, and other params of this structure serve as
      well (of another `fdq.prepare` layout too).
    """
    template, params = split(model)
    return functools.partial(_step, template), params


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _extend(template: Template, params: Any, tokens: jax.Array, cache: KVCache, start: jax.Array):
    return bind(template, params).extend(tokens, cache, start)[1]


@functools.partial(
    jax.jit, static_argnums=0, donate_argnums=2, static_argnames=("steps", "sampling")
)
def _decode(
    template: Template,
    params: Any,
    state: DecodeState,
    stop_tokens: jax.Array,
    *,
    steps: int,
    sampling: Sampling | None,
) -> DecodeState:
    def body(state: DecodeState, _):
        logits, state = _step(template, params, state)
        return state.push(sample(logits, state.keys(), sampling), stop_tokens), None

    return jax.lax.scan(body, state, None, length=steps)[0]


def prefill(
    model: Any,
    tokens: Any,
    cache: KVCache,
    *,
    lengths: Any = None,
    chunk: int = 512,
    key: jax.Array | None = None,
) -> DecodeState:
    """Reads prompts into an empty cache, `chunk` tokens at a time.

    Args:
      model: a `fdq.models.Decoder`.
      tokens: [B, L] int, padded on the right with anything where prompts differ in length.
      cache: of B sequences and at least L slots; donated, and overwritten from slot 0 on.
      lengths: [B] int, tokens of each prompt; L where not given.
      chunk: tokens of each prompt per call of the model: bounds temporary memory.
      key: PRNG key for later sampling, `jax.random.key(0)` where not given.

    Returns:
      The state from which `decode` goes on.

    Raises:
      ValueError: before anything runs: prompts that are empty, longer than the cache or than L, a
        batch other than the cache's, or tokens outside the vocabulary.
    """
    key = checks.prng_key(key)
    template, params = split(model)
    traced = isinstance(tokens, Tracer) or isinstance(lengths, Tracer)
    if not isinstance(tokens, Tracer):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"prompt tokens: got {tokens.dtype} of shape {tokens.shape}, expected integers of "
            "shape [batch, length]"
        )
    b, width = tokens.shape
    capacity = cache.max_length
    if 0 in tokens.shape:
        raise ValueError(f"prompt tokens: got shape {tokens.shape}; there is nothing to read")
    if b != cache.batch:
        raise ValueError(f"got {b} prompts for a cache of {cache.batch} sequences")
    chunk = checks.integer("chunk", chunk, least=1)
    if lengths is None:
        lengths = np.full((b,), width, np.int32)
    longest = width if traced else _longest(np.asarray(lengths), b, width)
    if longest > capacity:
        raise ValueError(
            f"a prompt of {longest} tokens does not fit in a cache of {capacity} slots; "
            "make the cache with a larger max_length"
        )
    if not traced:
        _check_vocabulary(np.asarray(tokens), np.asarray(lengths), model.config.vocab_size)
        tokens = tokens[:, :longest]
    tokens = jnp.asarray(tokens, jnp.int32)
    lengths = jnp.asarray(lengths, jnp.int32)
    # The last token of each prompt is fed by the first step. Rows that end earlier write what
    # nobody reads: slots at and after a row's length are overwritten before they are attended to.
    for start in range(0, longest - 1, chunk):
        count = min(chunk, longest - 1 - start)
        padded = _chunk_length(count, chunk, capacity - start)
        piece = tokens[:, start : start + padded]
        piece = jnp.pad(piece, ((0, 0), (0, padded - piece.shape[1])))
        cache = _extend(template, params, piece, cache, jnp.int32(start))
    # Every array is a buffer of its own, for the state is donated: nothing of the caller's, and
    # nothing twice.
    return DecodeState(
        tokens=jnp.zeros((b, capacity), jnp.int32).at[:, : tokens.shape[1]].set(tokens),
        length=jnp.array(lengths, copy=True),
        prompt_length=jnp.array(lengths, copy=True),
        finished=lengths >= capacity,
        key=jnp.array(key, copy=True),
        cache=dataclasses.replace(cache, length=lengths - 1),
    )


def decode(
    model: Any,
    state: DecodeState,
    steps: int,
    *,
    sampling: Sampling | None = None,
    stop_tokens: Any = (),
) -> DecodeState:
    """Generates up to `steps` tokens per sequence in one compiled loop.

    Args:
      model: the model that prefilled `state`.
      state: donated: use the one that comes back.
      steps: trip count of the loop; compiled for each value.
      sampling: None is greedy.
      stop_tokens: tokens that finish a sequence: a list for all, or a list per sequence.

    Returns:
      The state; see `DecodeState.generated`.

    Raises:
      ValueError: `steps` more tokens do not fit in the cache of a sequence that is not finished.
    """
    steps = checks.integer("steps", steps)
    template, params = split(model)
    b, capacity = state.tokens.shape
    if not isinstance(state.length, Tracer):
        length, finished = jax.device_get((state.length, state.finished))
        known = int(np.max(np.where(finished, 0, length)))
        if known + steps > capacity:
            raise ValueError(
                f"{steps} more tokens after {known} do not fit in a cache of {capacity} slots. "
                "Make a longer cache or take fewer steps"
            )
    stops = jnp.asarray(stop_table(stop_tokens, b))
    return _decode(template, params, state, stops, steps=steps, sampling=sampling)


def stop_table(stop_tokens: Any, batch: int) -> np.ndarray:
    """`[batch, n]` int32 of a list of tokens for all, or of a list per sequence; -1 fills up."""
    if np.ndim(stop_tokens) == 0:
        stop_tokens = (stop_tokens,)
    rows = list(stop_tokens)
    if not any(isinstance(row, Sequence | np.ndarray) for row in rows):
        rows = [rows] * batch
    if len(rows) != batch:
        raise ValueError(f"got stop tokens for {len(rows)} sequences, expected {batch}")
    table = np.full((batch, max(map(len, rows), default=0)), -1, np.int32)
    for row, stops in zip(table, rows, strict=True):
        row[: len(stops)] = [checks.token("stop token", stop, least=-1) for stop in stops]
    return table


def _longest(lengths: np.ndarray, b: int, width: int) -> int:
    """The length of the longest prompt."""
    if lengths.shape != (b,):
        raise ValueError(f"prompt lengths: got shape {lengths.shape}, expected {(b,)}")
    if lengths.min(initial=1) < 1 or lengths.max(initial=1) > width:
        raise ValueError(
            f"prompt lengths {lengths.tolist()} must be between 1 and {width}, the width of tokens"
        )
    return int(lengths.max())


def _check_vocabulary(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> None:
    known = tokens[np.arange(tokens.shape[1])[None] < lengths[:, None]]
    if known.min() < 0 or known.max() >= vocab_size:
        raise ValueError(
            f"prompt tokens range over {known.min()} ... {known.max()}, "
            f"expected 0 ... {vocab_size - 1}"
        )


def _chunk_length(count: int, chunk: int, room: int) -> int:
    """Length to which a chunk of `count` tokens is padded: few values, within `room` slots."""
    length = _SMALLEST_CHUNK
    while length < count:
        length *= 2
    length = min(length, max(chunk, count))
    return length if length <= room else count
