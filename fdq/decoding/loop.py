"""Prefill and the decode loop: pure functions over pytrees under one `jax.jit`.

    state = prefill(model, tokens, KVCache.init(model.config, batch=1, max_length=4096))
    state = decode(model, state, steps=64)
    state.generated()

    state = prefill(model, more_tokens, state=state)   # a conversation goes on

The model is split into arrays and a hashable template at each call (fractions of a millisecond):
arrays are arguments of the compiled function, never constants, a second call with equal shapes does
not compile again, and whatever was changed in the model counts from the next call on.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq import processes
from fdq.cache.kv_cache import KVCache
from fdq.cache.shardings import laid_out_like
from fdq.decoding import checks, programs
from fdq.decoding.chunks import default_chunk
from fdq.decoding.functional import placement_of, taken
from fdq.decoding.programs import LogitsProcessor
from fdq.decoding.sampling import Sampling, checked
from fdq.decoding.state import DecodeState
from fdq.nn.embedding import check_vocabulary, token_array
from fdq.nn.parameters import Template, current_split
from fdq.ops.placement import mesh_of, on_current_mesh

# A prompt's last chunk is padded to one of few lengths, so that few shapes are compiled.
_SMALLEST_CHUNK = 16

# A GPU waits for the host at each trip of a loop of unknown length, not at those of a loop within.
_STEPS_A_TRIP = 16


def prefill(
    model: Any,
    tokens: Any,
    cache: KVCache | None = None,
    *,
    state: DecodeState | None = None,
    lengths: Any = None,
    chunk: int | None = None,
    key: jax.Array | None = None,
    return_logprobs: bool = False,
) -> DecodeState:
    """Reads prompts into an empty cache, or more of them into a state, `chunk` tokens at a time.

    Args:
      model: a `fdq.models.Decoder`.
      tokens: [B, L] int, padded on the right with anything where prompts differ in length.
      cache: an empty one of B sequences and at least L slots; donated.
      state: instead of a cache: each sequence goes on with its tokens, finished or not; donated.
        `generated` then counts from their end.
      lengths: [B] int, tokens of each prompt, 1 to L (with a state 0 to L); L where not given.
      chunk: tokens of each prompt per call of the model: bounds temporary memory. Not given, 512;
        on GPUs 2048, or less where little memory is free.
      key: PRNG key for later sampling, `jax.random.key(0)` where not given; a state has its own.
      return_logprobs: keep the log-probability of each token that is generated from here on, see
        `DecodeState.generated_logprobs`; a state says so itself.

    Returns:
      The state from which `decode` goes on.

    Raises:
      ValueError: before anything runs: a cache that holds tokens, a cache and a state or neither,
        prompts that are empty, longer than the cache or than L, a batch other than the cache's, or
        tokens outside the vocabulary.
    """
    checks.decodable("prefill", model)
    if (cache is None) == (state is None):
        raise ValueError("prefill: expected either an empty cache or a state to go on from.")
    if state is not None and (key is not None or return_logprobs):
        raise ValueError("prefill: a state has its own keys (state.reseed) and log-probabilities.")
    key = checks.prng_key(key)
    chunk = None if chunk is None else checks.integer("chunk", chunk, least=1)
    if state is not None:
        checks.is_state("prefill", state)
    elif not isinstance(cache, KVCache):
        raise TypeError(
            "prefill: expected a fdq.KVCache, such as fdq.KVCache.init(model.config, batch=1, "
            f"max_length=128, format='C8'), found {cache!r:.100}."
        )
    held = cache if state is None else state.cache
    assert held is not None
    prompts = _Prompts(tokens, lengths, held, model.config, state)
    chunk = chunk or default_chunk(model.config, held.batch, held.max_length)
    template, params = current_split(model)
    if state is None:
        checks.empty(held)
    if placement_of(model) is not None:
        held, state = placement_of(model).put((held, state))
    with mesh_of(params, held):
        if state is not None:
            return _go_on(template, params, prompts, state, chunk)
        held = _read(template, params, prompts, on_current_mesh(held), chunk)
        state = DecodeState.start(
            prompts.tokens, prompts.lengths, held, key=key, logprobs=return_logprobs
        )
    return state if placement_of(model) is None else placement_of(model).put(state)


def _read(
    template: Template, params: Any, prompts: "_Prompts", held: KVCache, chunk: int
) -> KVCache:
    capacity, longest = held.max_length, prompts.longest
    # The last token of each prompt is fed by the first step. Rows that end earlier write what
    # nobody reads: slots at and after a row's length are overwritten before they are attended to.
    for start in range(0, longest - 1, chunk):
        count = min(chunk, longest - 1 - start)
        padded = _chunk_length(count, chunk, capacity - start)
        piece = prompts.tokens[:, start : start + padded]
        piece = jnp.pad(piece, ((0, 0), (0, padded - piece.shape[1])))
        held = programs.extend(template, params, piece, held, jnp.int32(start), prompts.lengths)
    return held


def _go_on(
    template: Template, params: Any, prompts: "_Prompts", state: DecodeState, chunk: int
) -> DecodeState:
    known, capacity = state.length, state.capacity
    # A sequence that was finished goes on; one that takes nothing stays as it is.
    more = prompts.lengths > 0
    state = dataclasses.replace(state, finished=state.finished & ~more)
    width = max(_SMALLEST_CHUNK, 1 << (prompts.tokens.shape[1] - 1).bit_length())
    padded = jnp.pad(prompts.tokens, ((0, 0), (0, width - prompts.tokens.shape[1])))
    cache = state.cache
    # Without the cache, which does not change; padded, so that few lengths are compiled.
    small = dataclasses.replace(state, cache=None)  # pyright: ignore[reportArgumentType]
    state = _taken(small, padded, prompts.lengths)
    longest = 0 if isinstance(known, Tracer) else int(np.max(processes.on_host(known)))
    start, spare = 0, cache.spare
    while start < prompts.longest:
        count = min(chunk, prompts.longest - start)
        room = capacity - max(longest - 1, 0) - start
        # What reaches beyond the cache begins earlier, on slots that were written already.
        if spare is not None and (count > room or isinstance(known, Tracer)):
            count = min(count, spare)
        if spare is not None and isinstance(known, Tracer):
            room = min(room, spare)
        padded = _chunk_length(count, chunk, room)
        first = known - 1 + start
        cache = programs.extend_from(
            template, params, state.tokens, cache, first, padded, state.length
        )
        start += count
    old = state.prompt_length
    return dataclasses.replace(
        state,
        prompt_length=laid_out_like(old, jnp.where, more, state.length, old),
        cache=dataclasses.replace(cache, length=state.length - 1),
    )


_taken = jax.jit(taken)


class _Prompts:
    """Prompts that were checked: `tokens [B, L]`, `lengths [B]`, and the longest length."""

    def __init__(
        self, tokens: Any, lengths: Any, cache: KVCache, config: Any, state: DecodeState | None
    ):
        traced = isinstance(tokens, Tracer) or isinstance(lengths, Tracer)
        if not isinstance(tokens, Tracer):
            tokens = token_array("prompt tokens", tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"prompt tokens: got {tokens.dtype} of shape {tokens.shape}, expected integers of "
                "shape [batch, length]"
            )
        b, width = tokens.shape
        if 0 in tokens.shape:
            raise ValueError(f"prompt tokens: got shape {tokens.shape}; there is nothing to read")
        if b != cache.batch:
            raise ValueError(f"got {b} prompts for a cache of {cache.batch} sequences")
        if lengths is None:
            lengths = np.full((b,), width, np.int32)
        least = 1 if state is None else 0
        if isinstance(lengths, Tracer):
            lengths = checks.integers("prefill: lengths", lengths, (b,))
        longest = width if traced else checks.prompt_lengths(np.asarray(lengths), b, width, least)
        known = 0
        if state is not None and not traced and not isinstance(state.length, Tracer):
            known = processes.on_host(state.length)
        needed = longest if traced else int((known + np.asarray(lengths)).max())
        if needed > cache.max_length:
            raise ValueError(
                f"a prompt of {needed} tokens does not fit in a cache of {cache.max_length} slots; "
                "make the cache with a larger max_length"
            )
        if not traced:
            real = np.arange(width)[None] < np.asarray(lengths)[:, None]
            check_vocabulary("prompt tokens", np.asarray(tokens)[real], config.vocab_size)
            rotary = getattr(config, "rotary", None)
            if state is None and rotary is not None:
                rotary.warn_of_growth(int(np.min(lengths)), cache.max_length)
            tokens = tokens[:, : max(longest, 1)]
        self.tokens = jnp.asarray(tokens, jnp.int32)
        self.lengths = jnp.asarray(lengths, jnp.int32)
        self.longest = longest


def decode(
    model: Any,
    state: DecodeState,
    steps: int,
    *,
    sampling: Sampling | None = None,
    stop_tokens: Any = (),
    logits_processor: LogitsProcessor | None = None,
    **unknown: Any,
) -> DecodeState:
    """Generates up to `steps` tokens per sequence in one compiled loop.

    Args:
      model: the model that prefilled `state`.
      state: donated: use the one that comes back.
      steps: how many; one compiled loop serves all numbers, but for one in your own `jax.jit`.
      sampling: None is greedy.
      stop_tokens: tokens that finish a sequence: a list for all, or a list per sequence.
      logits_processor: changes logits before a token is drawn, see `LogitsProcessor`. A function
        that is made anew for each call is compiled anew; arrays that change belong in a
        `jax.tree_util.Partial`.
      unknown: nothing; a name that is none of these is refused with what is meant.

    Returns:
      The state; see `DecodeState.generated`.

    Raises:
      ValueError: `steps` more tokens do not fit in the cache of a sequence that is not finished.
      TypeError: a model that cannot be decoded, or an argument that there is not.
    """
    checks.keywords("decode", unknown, decode)
    checks.decodable("decode", model)
    checks.is_state("decode", state)
    checks.function("logits_processor", logits_processor)
    steps = checks.integer("steps", steps)
    b, capacity = state.tokens.shape
    if not isinstance(state.length, Tracer):
        length, finished = processes.on_host((state.length, state.finished))
        known = int(np.max(np.where(finished, 0, length)))
        if known + steps > capacity:
            raise ValueError(
                f"{steps} more tokens after {known} do not fit in a cache of {capacity} slots. "
                "Make a longer cache or take fewer steps"
            )
    return run(
        model,
        state,
        steps,
        sampling=sampling,
        stop_tokens=stop_table(stop_tokens, b),
        logits_processor=logits_processor,
    )


def run(
    model: Any,
    state: DecodeState,
    steps: int,
    *,
    sampling: Sampling | None,
    stop_tokens: np.ndarray,
    logits_processor: LogitsProcessor | None,
) -> DecodeState:
    """`decode` without its checks."""
    template, params = current_split(model)
    processor = logits_processor
    if processor is not None and not isinstance(processor, jax.tree_util.Partial):
        processor = jax.tree_util.Partial(processor)
    if sampling is not None:
        sampling = checked(sampling).for_batch(state.batch)
    # Put there explicitly, which `jax.transfer_guard("disallow")` lets through.
    stops, sampling, count = jax.device_put((stop_tokens, sampling, np.int32(steps)))
    arguments = (template, params, state, stops, sampling, processor)
    with mesh_of(params, state):
        if isinstance(state.length, Tracer):
            return programs.decode(*arguments, steps=steps)
        on_cpu = jax.default_backend() == "cpu"
        return programs.decode(*arguments, count, a_trip=1 if on_cpu else _STEPS_A_TRIP)


def stop_table(stop_tokens: Any, batch: int) -> np.ndarray:
    """`[batch, n]` int32 of a list of tokens for all, or of a list per sequence; -1 fills up."""

    def is_list(value: Any) -> bool:
        if isinstance(value, str | bytes):
            raise TypeError(f"stop_tokens: expected numbers of tokens, found {value!r}.")
        return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0

    rows: list[Any] = list(stop_tokens) if is_list(stop_tokens) else [stop_tokens]
    lists = [is_list(row) for row in rows]
    if any(lists) and not all(lists):
        raise TypeError(
            f"stop_tokens: expected tokens, or a list of them per sequence, found {stop_tokens!r}."
        )
    if not any(lists):
        rows = [rows] * batch
    rows = [list(row) for row in rows]
    if len(rows) != batch:
        raise ValueError(f"got stop tokens for {len(rows)} sequences, expected {batch}")
    table = np.full((batch, max(map(len, rows), default=0)), -1, np.int32)
    for row, stops in zip(table, rows, strict=True):
        row[: len(stops)] = [checks.token("stop token", stop, least=-1) for stop in stops]
    return table


def _chunk_length(count: int, chunk: int, room: int) -> int:
    """Length to which a chunk of `count` tokens is padded: few values, within `room` slots."""
    length = _SMALLEST_CHUNK
    while length < count:
        length *= 2
    length = min(length, max(chunk, count))
    return length if length <= room else count
