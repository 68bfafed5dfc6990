"""A model as pure functions over a pytree of its arrays: for calls in your own jit."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq.cache.kv_cache import KVCache
from fdq.cache.shardings import laid_out_like
from fdq.decoding import checks
from fdq.decoding.state import DecodeState, log_probabilities
from fdq.nn.embedding import check_vocabulary
from fdq.nn.parameters import Template, bind, split
from fdq.ops.placement import in_auto_axes, mesh_of, on_current_mesh, spec_entries
from fdq.ops.transposing import is_traced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Functional:
    """What `fdq.functional` returns; `step, params = fdq.functional(model)` takes it apart.

    The functions are pure, hold none of the arrays, and are meant for `jax.jit`: each call outside
    of one runs operation by operation. Other params of this structure serve as well, of another
    `fdq.prepare` layout too. All of it is a pytree, and so may be one argument of your own jit
    (of what `jax.export` serializes `params` may: a template is Python objects).

    Attributes:
      params: nested dicts of arrays and QTensors; all keys are strings.
      template: what is static about the model; hashable.
    """

    params: dict
    template: Template = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        """Without the arrays."""
        return f"Functional({len(self.template.paths)} arrays: step, extend, init, params)"

    def __iter__(self) -> Iterator[Any]:
        """`step`, then `params`."""
        return iter((self.step, self.params))

    def __getitem__(self, index: int) -> Any:
        """`step` at 0, `params` at 1."""
        return (self.step, self.params)[index]

    @property
    def step(self) -> Callable[[Any, DecodeState], tuple[jax.Array, DecodeState]]:
        """`step(params, state) -> (logits [B, V] float32, state)`: feeds each last token.

        Follow it with `state.push(next_token)`.
        """
        return functools.partial(step, self.template)

    @property
    def extend(self) -> Callable[..., tuple[jax.Array, DecodeState]]:
        """`extend(params, tokens [B, T], state) -> (logits [B, T, V] float32, state)`.

        The same as T times `step` and a `push` of the given tokens, in one pass: `logits[:, i]` are
        those that `tokens[:, i]` is drawn from, so they verify a draft and score a continuation as
        they stand. One token more, whatever it is, gives the logits after the last. Finished
        sequences take nothing, and what a sequence has no room for is not taken; logits that
        follow such a token are NaN. `state.rollback(length)` forgets tokens again.

        Where rotations depend on the length of a sequence (`dynamic`, `longrope`), leave room for
        T tokens: at the end of the cache the last T slots are written anew. Caches with rings take
        at most `cache.spare` tokens at once.
        """
        return functools.partial(extend, self.template)

    @property
    def init(self) -> Callable[..., DecodeState]:
        """`init(params, tokens [B, L], max_length, *, lengths, format, key, return_logprobs)`.

        `fdq.prefill` in one pass, into a new cache of `max_length` slots: the state that `step`
        takes. `format` is of the cache, by default that of the model's scheme; the other keywords
        are those of `fdq.prefill`.
        """
        return functools.partial(init, self.template)


def functional(model: Any) -> Functional:
    """The model as pure functions, and its arrays as a plain pytree.

    Args:
      model: a `fdq.models.Decoder`, concrete, abstract, or traced (an argument of your own jit).

    Returns:
      `fns` with `fns.step`, `fns.extend`, `fns.init` and `fns.params`; `step, params = fns` works
      as well.

    Raises:
      TypeError: a model that cannot be decoded; says what can.
    """
    checks.decodable("functional", model)
    template, params = split(model)
    return Functional(params, template)


def step(template: Template, params: Any, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """See `Functional.step`."""
    checks.is_state("step", state)
    model = bind(template, params)
    if placement_of(model) is not None:
        return placement_of(model).run(model, next_logits, (state,), out=(("logits", 2), 0))
    with mesh_of(params, state):
        return next_logits(model, on_current_mesh(state))


def placement_of(model: Any) -> Any:
    """How a model lies on a mesh; None on one device, and of a model that is not fdq's."""
    return getattr(model, "placement", None)


def next_logits(model: Any, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """`Functional.step` of a model."""
    start = state.length - 1
    with jax.named_scope("last_tokens"):
        tokens = state.last_tokens()
    hidden, cache = model.extend(tokens, state.cache, start)
    # A copy: the state may be donated, whose buffers are all its own.
    cache = dataclasses.replace(cache, length=jnp.array(state.length, copy=True))
    return model.head(hidden[:, 0]), dataclasses.replace(state, cache=cache)


def extend(
    template: Template, params: Any, tokens: jax.Array, state: DecodeState
) -> tuple[jax.Array, DecodeState]:
    """See `Functional.extend`."""
    checks.is_state("extend", state)
    tokens = checks.integers("extend: tokens", tokens, (state.batch, None))
    t, capacity = tokens.shape[1], state.capacity
    if not 0 < t < capacity:
        raise ValueError(f"extend: got {t} tokens, expected 1 to {capacity - 1}.")
    spare = state.cache.spare
    if spare is not None and t > spare:
        raise ValueError(
            f"extend: got {t} tokens, but the layers with a sliding window take {spare} at once: "
            "extend in pieces, or make the cache with a larger `spare`."
        )
    model = bind(template, params)
    _check_vocabulary("extend: tokens", tokens, model)
    if placement_of(model) is not None:
        rows = placement_of(model).put((tokens, state))
        return placement_of(model).run(model, _extend, rows, out=(("logits", 3), 1))
    with mesh_of(params, state):
        return _extend(model, tokens, on_current_mesh(state))


def _extend(model: Any, tokens: jax.Array, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    t, capacity = tokens.shape[1], state.capacity
    state, known = taken(state, tokens), state.length
    first = window_start(known - 1, t, capacity)
    each = jnp.arange(t, dtype=jnp.int32)[None]
    # Each token is rotated as its own step would rotate it.
    by_token = first[:, None] + each + 1
    cache = state.cache.ending(state.length)
    hidden, cache = feed(model, state.tokens, cache, first, t, by_token, state.length)
    # The window begins earlier than the first token where it would reach beyond the cache.
    inside = jnp.minimum(known[:, None] - 1 - first[:, None] + each, t - 1)[..., None]
    along = functools.partial(jnp.take_along_axis, axis=1)
    hidden = in_auto_axes(along, hidden, inside, result=lambda: spec_entries(hidden))
    logits = model.head(hidden)
    follows = known[:, None] + each <= state.length[:, None]
    logits = jnp.where(follows[..., None], logits, jnp.nan)
    cache = dataclasses.replace(cache.ending(None), length=state.length - 1)
    if state.logprobs is not None:
        state = with_logprobs(state, tokens, whole_logits(model, logits), known)
    return logits, dataclasses.replace(state, cache=cache)


def init(
    template: Template,
    params: Any,
    tokens: jax.Array,
    max_length: int,
    *,
    lengths: Any = None,
    format: Any = None,
    key: jax.Array | None = None,
    return_logprobs: bool = False,
) -> DecodeState:
    """See `Functional.init`."""
    tokens = checks.integers("init: tokens", tokens, (None, None))
    b, width = tokens.shape
    max_length = checks.integer("init: max_length", max_length, least=1)
    if not 0 < width <= max_length:
        raise ValueError(f"init: got prompts of {width} tokens, expected 1 to {max_length}.")
    if isinstance(lengths, Tracer):
        lengths = checks.integers("init: lengths", lengths, (b,))
    elif lengths is not None:
        checks.prompt_lengths(np.asarray(lengths), b, width)
    model = bind(template, params)
    _check_vocabulary("init: tokens", tokens, model, lengths)
    with mesh_of(params):
        cache: KVCache = on_current_mesh(model.init_cache(b, max_length, format))
        tokens = jnp.asarray(tokens, jnp.int32)
        lengths = jnp.full((b,), width, jnp.int32) if lengths is None else jnp.asarray(lengths)
        if width > 1:
            known = by_length(model, lengths) | by_ring(cache, lengths)
            cache = model.extend(tokens[:, :-1], cache.ending(lengths), jnp.int32(0), **known)[1]
            cache = cache.ending(None)
        return DecodeState.start(tokens, lengths, cache, key=key, logprobs=return_logprobs)


def whole_logits(model: Any, logits: jax.Array) -> jax.Array:
    """Logits of all tokens, where the model is a shard that has those of some."""
    axes = getattr(model, "vocabulary_axes", ())
    return jax.lax.all_gather(logits, axes, axis=logits.ndim - 1, tiled=True) if axes else logits


def _check_vocabulary(what: str, tokens: Any, model: Any, lengths: Any = None) -> None:
    """ValueError for tokens that a model has no embedding of, as far as values are known."""
    known = not is_traced(tokens, lengths) and getattr(tokens, "is_fully_addressable", True)
    if known:
        found = np.asarray(jax.device_get(tokens))
        if lengths is not None:
            found = found[np.arange(found.shape[1])[None] < np.asarray(lengths)[:, None]]
        check_vocabulary(what, found, model.config.vocab_size)


def taken(state: DecodeState, tokens: jax.Array, count: jax.Array | None = None) -> DecodeState:
    """The state that knows `tokens [B, T]` as well, `count [B]` of each (all), as far as they fit.

    Its cache is as it was; finished sequences take nothing.
    """
    count = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if count is None else count
    small = dataclasses.replace(state, cache=None)  # pyright: ignore[reportArgumentType]
    small = laid_out_like(small, _taken, small, tokens, count)
    return dataclasses.replace(small, cache=state.cache)


def _taken(state: DecodeState, tokens: jax.Array, count: jax.Array) -> DecodeState:
    b, t = tokens.shape
    new = jnp.arange(t, dtype=jnp.int32)[None]
    at = state.length[:, None] + new
    goes_in = (new < count[:, None]) & ~state.finished[:, None] & (at < state.capacity)
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    # What does not go in is written beyond the end, where it is dropped.
    at = jnp.where(goes_in, at, state.capacity)
    length = state.length + goes_in.sum(axis=1, dtype=jnp.int32)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, at].set(tokens.astype(jnp.int32), mode="drop"),
        length=length,
        finished=state.finished | (length >= state.capacity),
    )


def with_logprobs(
    state: DecodeState, tokens: jax.Array, logits: jax.Array, known: jax.Array
) -> DecodeState:
    """The state with the log-probabilities of `tokens [B, T]`, which follow the `known [B]`."""
    old, capacity = state.logprobs, state.capacity
    assert old is not None

    def written(old: jax.Array, each: jax.Array, known: jax.Array, length: jax.Array) -> jax.Array:
        b, t = each.shape
        at = known[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        at = jnp.where(at < length[:, None], at, capacity)
        return old.at[jnp.arange(b, dtype=jnp.int32)[:, None], at].set(each, mode="drop")

    arrays = old, log_probabilities(logits, tokens), known, state.length
    return dataclasses.replace(state, logprobs=laid_out_like(old, written, *arrays))


def window_start(first: jax.Array, count: int, capacity: int) -> jax.Array:
    """Where `count` slots from `first [B]` on begin, moved back where they would not fit."""
    return jnp.clip(first, 0, capacity - count)


def feed(
    model: Any,
    tokens: jax.Array,
    cache: KVCache,
    start: jax.Array,
    count: int,
    lengths: jax.Array,
    ends: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Runs the model over `count` tokens of `tokens [B, capacity]` from `start [B]` on.

    `lengths` and `ends` are as in `Decoder.extend`.
    Slots that were known before are written again with what they held (but for rotations that
    depend on lengths); what is not known yet is written and overwritten later, before anybody
    reads it.
    """

    def cut(tokens: jax.Array, start: jax.Array) -> jax.Array:
        at = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        return jnp.take_along_axis(tokens, at, axis=1)

    fed = in_auto_axes(cut, tokens, start, result=lambda: spec_entries(tokens))
    return model.extend(fed, cache, start, **by_length(model, lengths), **by_ring(cache, ends))


def by_length(model: Any, lengths: jax.Array) -> dict[str, jax.Array]:
    """What `extend` is told of lengths: nothing, unless the model's rotation depends on them."""
    rotary = getattr(model.config, "rotary", None)
    return {"lengths": lengths} if rotary is not None and rotary.by_length else {}


def by_ring(cache: KVCache, ends: jax.Array) -> dict[str, jax.Array]:
    """What `extend` is told of where tokens end: nothing, unless layers of the cache are rings."""
    return {} if cache.reach is None else {"ends": ends}
