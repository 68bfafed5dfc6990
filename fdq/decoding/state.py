"""The carry of the decode loop, and what can be done with it between two steps."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from fdq import processes
from fdq.cache.batch_rows import batch_rows
from fdq.cache.kv_cache import KVCache
from fdq.cache.shardings import laid_out_like
from fdq.decoding import checks
from fdq.ops.placement import in_auto_axes, spec_entries

_COPIES = 2**31 - 1  # no position is as high


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Sequences that are being decoded: their tokens, their keys and values, and how they draw.

    Invariant: before a step the cache holds every known token of a sequence but the last, which
    the step feeds. A step without a `push` may be repeated: it gives the same logits.

    Attributes:
      tokens: [B, capacity] int32, prompt and generated tokens; capacity is the cache's slots.
      length: [B] int32, how many tokens are known.
      prompt_length: [B] int32, how many of them were given.
      finished: [B] bool; the tokens of a finished sequence no longer change.
      key: [B] PRNG keys, one a sequence, which it takes along when rows are reordered. The draw of
        the token at position i uses `fold_in(key, i)`, so it depends neither on the batch nor on
        how the steps are cut into calls.
      cache: the KV cache.
      logprobs: [B, capacity] float32, the log-probability that the model gave to each generated
        token, before sampling and processors changed it; 0 elsewhere. None where nobody asked.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_length: jax.Array
    finished: jax.Array
    key: jax.Array
    cache: KVCache
    logprobs: jax.Array | None = None

    @classmethod
    def start(
        cls,
        tokens: jax.Array,
        length: jax.Array,
        cache: KVCache,
        *,
        key: jax.Array | None = None,
        logprobs: bool = False,
    ) -> Self:
        """The state before the first step.

        Args:
          tokens: [B, L] int, the prompts; L at most the cache's slots.
          length: [B] int, tokens of each prompt.
          cache: holds all of each prompt but its last token.
          key: one PRNG key, `jax.random.key(0)` where not given; sequence b draws with
            `fold_in(key, b)`.
          logprobs: keep the log-probabilities of generated tokens.
        """
        b, capacity = tokens.shape[0], cache.max_length
        length = jnp.asarray(length, jnp.int32)
        # Every array is a buffer of its own, for the state is donated: nothing of the caller's, and
        # nothing twice.
        return cls(
            tokens=jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, capacity - tokens.shape[1]))),
            length=jnp.array(length, copy=True),
            prompt_length=jnp.array(length, copy=True),
            finished=length >= capacity,
            key=_sequence_keys(key, b),
            cache=dataclasses.replace(cache, length=length - 1),
            logprobs=jnp.zeros((b, capacity), jnp.float32) if logprobs else None,
        )

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self.tokens.shape[1]

    def last_tokens(self) -> jax.Array:
        """[B, 1] int32, the last known token of each sequence."""

        def last(tokens: jax.Array, length: jax.Array) -> jax.Array:
            return jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)

        return in_auto_axes(
            last, self.tokens, self.length, result=lambda: spec_entries(self.tokens)
        )

    def keys(self) -> jax.Array:
        """[B] PRNG keys for the next token of each sequence."""
        return jax.vmap(jax.random.fold_in)(self.key, self.length)

    def reseed(self, key: jax.Array) -> Self:
        """The state whose sequence b draws with `fold_in(key, b)` from here on.

        After a `take` that repeats rows: copies of a sequence draw what it draws.
        """
        keys, where = _sequence_keys(key, self.batch), getattr(self.key, "sharding", None)
        if not isinstance(self.key, Tracer) and isinstance(where, NamedSharding):
            keys = processes.onto(keys, where)
        return dataclasses.replace(self, key=keys)

    def push(
        self,
        next_token: jax.Array,
        stop_tokens: jax.Array | None = None,
        *,
        logits: jax.Array | None = None,
    ) -> Self:
        """The state with one more token per sequence; finished sequences stay as they are.

        Args:
          next_token: [B] int.
          stop_tokens: [B, n] or [n] int; a sequence that gets one of its own is finished, the
            token included. -1 never matches.
          logits: [B, V] that the step gave, for a state that keeps log-probabilities.

        Raises:
          ValueError: a state that keeps log-probabilities, and no logits; or tokens that are no
            integers, or not one a sequence.
        """
        next_token = checks.integers("next_token", next_token, (self.batch,))
        if stop_tokens is not None:
            stop_tokens = jnp.asarray(stop_tokens, jnp.int32)
        if self.logprobs is not None and logits is None:
            raise ValueError("this state keeps log-probabilities: push(next_token, logits=logits)")
        if self.logprobs is None:
            logits = None
        # The cache does not pass through the call: it has an array a layer and more.
        small = dataclasses.replace(self, cache=None)  # pyright: ignore[reportArgumentType]
        pushed = laid_out_like(small, _push, small, next_token, stop_tokens, logits)
        return dataclasses.replace(pushed, cache=self.cache)

    def rollback(self, length: Any) -> Self:
        """The state when it had `length` tokens: what came later is forgotten.

        A `push` may follow at once. Nothing is copied or cleared: slots at and after a sequence's
        length are overwritten before anybody reads them. Sequences that lose tokens are no longer
        finished.

        Args:
          length: int for all or [B] int, from 1 to the tokens known.

        Raises:
          ValueError: a length outside of this, or farther back than the rings of layers with a
            sliding window hold what they see (see `KVCache.rollback`), as far as values are known.
        """
        checks.rollback_length(length, self.length, least=1)
        new = jnp.clip(jnp.asarray(length, jnp.int32), 1, self.length)
        logprobs = self.logprobs
        if logprobs is not None:
            at = jnp.arange(self.capacity, dtype=jnp.int32)[None]
            logprobs = jnp.where(at < new[:, None], logprobs, 0.0)
        return dataclasses.replace(
            self,
            length=new,
            prompt_length=jnp.minimum(self.prompt_length, new),
            finished=self.finished & (new == self.length),
            cache=self.cache.rollback(new - 1),
            logprobs=logprobs,
        )

    def take(self, rows: Any) -> Self:
        """The sequences `rows`, [N] int, in this order; any may come twice, or not at all.

        Each takes along its tokens, cache and key, so two copies of one draw the same tokens until
        `reseed`; `repeat` tells copies apart.

        Raises:
          ValueError: a row outside 0 ... B - 1, as far as values are known.
        """
        rows = batch_rows(rows, self.batch, ndim=1)
        small = dataclasses.replace(self, cache=None)  # pyright: ignore[reportArgumentType]
        taken = laid_out_like(small, _rows, small, rows)
        return dataclasses.replace(taken, cache=self.cache.take(rows))

    def repeat(self, count: int) -> Self:
        """Each sequence `count` times, side by side: rows 0, 0, 1, 1 for a count of 2.

        Each copy has a key of its own, so that no two draw the same, also of a state that was
        repeated before.
        """
        count = checks.integer("count", count, least=1)
        repeated = self.take(np.repeat(np.arange(self.batch), count))
        copies = np.tile(np.arange(count), self.batch)

        def of_copy(key: jax.Array, copy: Any) -> jax.Array:
            # First what no position is: `keys` folds those into the same key.
            return jax.random.fold_in(jax.random.fold_in(key, _COPIES), copy)

        keys = laid_out_like(repeated.key, jax.vmap(of_copy), repeated.key, copies)
        return dataclasses.replace(repeated, key=keys)

    def insert(self, row: Any, other: Self) -> Self:
        """The state with the sequences of `other` in place of those at `row`.

        Args:
          row: int, or [N] int where `other` has N sequences.
          other: of the same model and cache format, with at most as many slots. A sequence that
            is finished stays so.

        Raises:
          ValueError: rows outside of the batch, twice the same, or of another number than `other`
            has, another cache format, more slots, or log-probabilities in one of the two alone.
        """
        checks.is_state("insert", other)
        rows = jnp.atleast_1d(batch_rows(row, self.batch))
        if (self.logprobs is None) != (other.logprobs is None):
            raise ValueError("insert: one of the two states keeps no log-probabilities")
        cache = self.cache.insert(rows, other.cache)  # checks the sizes

        small, others = (dataclasses.replace(s, cache=None) for s in (self, other))  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(
            laid_out_like(small, _inserted, small, rows, others), cache=cache
        )

    def generated(self) -> list[list[int]]:
        """The generated tokens of each sequence, on the host; a stop token is the last of its."""
        return self._generated(self.tokens)

    def generated_logprobs(self) -> list[list[float]]:
        """The log-probability of each token of `generated`.

        Raises:
          ValueError: the state keeps none; see `prefill`.
        """
        if self.logprobs is None:
            raise ValueError("no log-probabilities: use prefill(..., return_logprobs=True)")
        return self._generated(self.logprobs)

    def _generated(self, array: jax.Array) -> list[list[Any]]:
        values, lengths, starts = processes.on_host((array, self.length, self.prompt_length))
        return [
            row[start:length].tolist()
            for row, start, length in zip(values, starts, lengths, strict=True)
        ]


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """float32 log-probabilities of `tokens [...]` under `logits [..., V]`, sharded or not."""

    def each(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.take_along_axis(every, tokens[..., None].astype(jnp.int32), axis=-1)[..., 0]

    return in_auto_axes(each, logits, tokens, result=lambda: spec_entries(logits)[:-1])


def divergences(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) in nats, `[..., V]` -> `[...]`; NaN where either has one.

    0 * log 0 is 0: a model may forbid a token with -inf.
    """
    terms = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q))
    return jnp.sum(terms, axis=-1)


def _rows[State](state: State, rows: jax.Array) -> State:
    return jax.tree.map(lambda array: array[rows], state)


def _inserted[State](state: State, rows: jax.Array, other: State) -> State:
    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        if new.ndim > 1 and new.shape[1] < old.shape[1]:
            new = jnp.pad(new, ((0, 0), (0, old.shape[1] - new.shape[1])))
        return old.at[rows].set(new)

    return jax.tree.map(put, state, other)


@jax.jit
def _push(
    state: DecodeState,
    next_token: jax.Array,
    stop_tokens: jax.Array | None,
    logits: jax.Array | None,
) -> DecodeState:
    b, capacity = state.tokens.shape
    next_token = next_token.astype(jnp.int32)
    at = jnp.minimum(state.length, capacity - 1)
    rows = jnp.arange(b)
    kept = jnp.where(state.finished, state.tokens[rows, at], next_token)
    length = jnp.where(state.finished, state.length, jnp.minimum(state.length + 1, capacity))
    stopped = jnp.zeros((b,), bool)
    if stop_tokens is not None and stop_tokens.size:
        stops = jnp.broadcast_to(jnp.atleast_2d(stop_tokens), (b, stop_tokens.shape[-1]))
        stopped = (stops == next_token[:, None]).any(axis=-1)
    logprobs = state.logprobs
    if logprobs is not None and logits is not None:
        one = log_probabilities(logits, next_token)
        logprobs = logprobs.at[rows, at].set(jnp.where(state.finished, logprobs[rows, at], one))
    # A full sequence is finished too: there is no slot to go on in.
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, at].set(kept),
        length=length,
        finished=state.finished | stopped | (length >= capacity),
        logprobs=logprobs,
    )


def _sequence_keys(key: jax.Array | None, batch: int) -> jax.Array:
    key = checks.prng_key(key)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
