"""Choosing the next token: greedy, temperature, top-k, top-p and min-p."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq.decoding import checks
from fdq.ops.placement import in_auto_axes, spec_entry
from pallas_kernels.typing import Array, Float, Int

_SMALLEST_TEMPERATURE = float(jnp.finfo(jnp.float32).tiny)  # smaller ones are flushed to zero
_FIELDS = ("temperature", "top_k", "top_p", "min_p")


class Sampling:
    """How the next token is drawn; each restriction applies to what the one before left.

    A pytree: numbers are arguments of what is compiled, so another temperature compiles nothing.
    Each may also be an array, `[B]` for a value a sequence, and may be traced.

    Attributes:
      temperature: logits are divided by it; 0 takes the largest logit (greedy), lowest token
        first among equals.
      top_k: only the `top_k` most likely tokens; None for all. One that is known is rounded up to
        a power of two for the number of candidates, so that few programs are compiled.
      top_p: only the fewest most likely tokens whose probabilities add up to `top_p` or more.
      min_p: only tokens at least `min_p` times as likely as the most likely one.

    Raises:
      ValueError: a value outside its range, as far as values are known.
      TypeError: a value that is neither a number nor an array of them.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    _count: int | None

    def __init__(
        self,
        *,
        temperature: Any = 1.0,
        top_k: Any = None,
        top_p: Any = None,
        min_p: Any = None,
    ):
        if temperature is None:
            raise TypeError("temperature: expected a number or an array of them, found None.")
        _check("temperature", temperature, "0 or more", lambda t: (t >= 0) & np.isfinite(t))
        for name, p in (("top_p", top_p), ("min_p", min_p)):
            _check(name, p, "above 0 and at most 1", lambda p: (p > 0) & (p <= 1))
        if top_k is not None and not _is_array(top_k):
            # More than any vocabulary has are all of them.
            top_k = min(checks.integer("top_k", top_k, least=1), np.iinfo(np.int32).max)
        elif top_k is not None and not jnp.issubdtype(top_k.dtype, jnp.integer):
            raise TypeError(f"top_k: expected integers, found {top_k.dtype}.")
        else:
            _check("top_k", top_k, "1 or more", lambda k: k >= 1)
        self._set(_candidate_count(top_k), (temperature, top_k, top_p, min_p))

    def _set(self, count: int | None, values: tuple[Any, ...]) -> None:
        vars(self).update(zip(_FIELDS, values, strict=True), _count=count)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses: a Sampling is immutable."""
        raise AttributeError(f"A Sampling is immutable; make one with {name}={value!r}.")

    def __repr__(self) -> str:
        """The fields that say something."""
        fields = [f"{n}={getattr(self, n)!r}" for n in _FIELDS if getattr(self, n) is not None]
        return f"Sampling({', '.join(fields)})"

    @property
    def greedy(self) -> bool:
        """Whether the temperature is known to be 0 for every sequence."""
        return not isinstance(self.temperature, Tracer) and not np.any(self.temperature)

    def for_batch(self, batch: int) -> Sampling | None:
        """One value a sequence in each field, or None where every one is greedy.

        Raises:
          ValueError: an array that is neither one number nor `[batch]`.
        """
        if self.greedy:
            return None

        def rows(name: str, dtype: Any) -> Any:
            value = getattr(self, name)
            if value is None:
                return None
            library: Any = jnp if isinstance(value, jax.Array) else np
            value = library.asarray(value, dtype)
            if value.shape not in ((), (batch,)):
                raise ValueError(
                    f"{name}: expected one number or [{batch}], one a sequence, "
                    f"found shape {value.shape}."
                )
            return library.broadcast_to(value, (batch,))

        dtypes = {"top_k": np.int32}
        made = object.__new__(Sampling)
        known = self.top_k is not None and not isinstance(self.top_k, Tracer)
        count = _candidate_count(self.top_k) if known else self._count
        made._set(count, tuple(rows(n, dtypes.get(n, np.float32)) for n in _FIELDS))
        return made


def _flatten(sampling: Sampling) -> tuple[tuple[Any, ...], int | None]:
    return tuple(getattr(sampling, name) for name in _FIELDS), sampling._count


def _unflatten(count: int | None, values: tuple[Any, ...]) -> Sampling:
    # Skips __init__: tree transformations fill the leaves with None, objects and tracers.
    sampling = object.__new__(Sampling)
    sampling._set(count, tuple(values))
    return sampling


jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


def checked(sampling: Any) -> Sampling:
    """`sampling` itself; TypeError for what is no `Sampling`."""
    if isinstance(sampling, Sampling):
        return sampling
    given = f"**{sampling!r}" if isinstance(sampling, dict) else f"temperature={sampling!r}"
    raise TypeError(
        f"sampling: expected a fdq.Sampling, found {sampling!r}. Did you mean "
        f"fdq.Sampling({given})?"
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _check(name: str, value: Any, expected: str, holds: Any) -> None:
    if value is None or isinstance(value, Tracer):
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool)
    kind: Any = getattr(value, "dtype", np.dtype(object))
    is_real = jnp.issubdtype(kind, jnp.number) and not jnp.issubdtype(kind, jnp.complexfloating)
    if not is_number and not (_is_array(value) and is_real):
        raise TypeError(f"{name}: expected a number or an array of them, found {value!r}.")
    if not np.all(holds(np.asarray(value))):
        raise ValueError(f"{name}: expected {expected}, found {value}.")


def _candidate_count(top_k: Any) -> int | None:
    """How many tokens are looked at: a power of two of at least `top_k`, None for all."""
    if top_k is None or isinstance(top_k, Tracer):
        return None
    return 1 << max(0, int(np.max(top_k)) - 1).bit_length()


def candidates(
    logits: Float[Array, " vocab"], sampling: Sampling, axes: tuple[str, ...] = ()
) -> tuple[Int[Array, " c"], Float[Array, " c"]]:
    """The tokens that may be drawn at a temperature above 0.

    `logits [V]` -> tokens [C] int32 and their logits [C] float32 after temperature, relative to
    the largest, -inf for those ruled out. The most likely come first where `top_k` or `top_p` need
    to know; else they are all tokens in order. Where the vocabulary is cut over mesh axes (in
    `jax.shard_map`), the latter are those of this device.
    """
    logits = logits.astype(jnp.float32)
    if sampling.top_k is None and sampling.top_p is None:
        tokens, scaled = jnp.arange(logits.size, dtype=jnp.int32), logits
        largest = logits.max()
        if axes:
            tokens, largest = tokens + _first_token(logits, axes), jax.lax.pmax(largest, axes)
    else:
        scaled, tokens = _most_likely(logits, sampling._count, axes)
        largest = scaled[0]
    # Relative to the largest, which a temperature near 0 must not divide to infinity.
    scaled = (scaled - largest) / jnp.maximum(sampling.temperature, _SMALLEST_TEMPERATURE)
    if sampling.top_k is not None:
        scaled = jnp.where(
            jnp.arange(scaled.size, dtype=jnp.int32) < sampling.top_k, scaled, -jnp.inf
        )
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(scaled)
        before = jnp.cumsum(probabilities) - probabilities
        # The first is always kept: nothing comes before it.
        scaled = jnp.where(before < sampling.top_p, scaled, -jnp.inf)
    if sampling.min_p is not None:
        scaled = jnp.where(scaled >= jnp.log(sampling.min_p), scaled, -jnp.inf)
    return tokens, scaled


def _first_token(logits: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The first token of the part of the vocabulary that this device has."""
    return jax.lax.axis_index(axes).astype(jnp.int32) * logits.shape[-1]


def _most_likely(
    logits: jax.Array, count: int | None, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """The `count` largest (None: all) logits and their tokens, the lowest first among equals."""
    own = min(count or logits.size, logits.size)
    scaled, tokens = jax.lax.top_k(logits, own)
    if not axes:
        return scaled, tokens
    # Those of each device, whose parts of the vocabulary come in order.
    tokens = tokens + _first_token(logits, axes)
    scaled, tokens = (jax.lax.all_gather(a, axes, tiled=True) for a in (scaled, tokens))
    scaled, places = jax.lax.top_k(scaled, min(count or scaled.size, scaled.size))
    return scaled, tokens[places]


def _largest(scores: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Index int32 of the largest of the last axis, which may be cut; the lowest among equals."""
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if not axes:
        return best
    largest = jnp.take_along_axis(scores, best[..., None], axis=-1).astype(jnp.float32)
    best = (best + _first_token(scores, axes))[..., None]
    # One message: the value and the bits of the index.
    pairs = jnp.concatenate([largest, jax.lax.bitcast_convert_type(best, jnp.float32)], axis=-1)
    pairs = jax.lax.all_gather(pairs, axes)
    first = jnp.argmax(pairs[..., 0], axis=0, keepdims=True)
    found = jnp.take_along_axis(pairs[..., 1], first, axis=0)[0]
    return jax.lax.bitcast_convert_type(found, jnp.int32)


def sample(
    logits: Float[Array, "b vocab"],
    keys: jax.Array | None,
    sampling: Sampling | None,
    axes: tuple[str, ...] = (),
) -> Int[Array, " b"]:
    """The next token of each sequence, int32; greedy where `sampling` is None.

    Each sequence has a PRNG key of its own, so that it draws the same alone and in a batch; `keys`
    may be None when greedy. In `jax.shard_map` the vocabulary may be cut over mesh `axes`: the
    tokens are those that one device would draw, and are on every device.

    Raises:
      ValueError: a temperature above 0 without keys, or an array of `sampling` that is neither one
        number nor `[B]`.
    """
    best = _largest(logits, axes)
    each = None if sampling is None else sampling.for_batch(logits.shape[0])
    if each is None:
        return best
    if keys is None:
        raise ValueError("sampling with a temperature above 0 needs PRNG keys")

    def draw(row: jax.Array, key: jax.Array, best: jax.Array, sampling: Sampling) -> jax.Array:
        tokens, scaled = candidates(row, sampling, axes)
        if axes and sampling.top_k is None and sampling.top_p is None:
            # The noise of all tokens, as one device has it.
            whole = scaled.size * jax.lax.axis_size(axes)
            noise = jax.random.gumbel(key, (whole,), scaled.dtype)
            own = jax.lax.dynamic_slice_in_dim(noise, _first_token(row, axes), scaled.size)
            drawn = _largest(scaled + own, axes)
        else:
            drawn = tokens[jax.random.categorical(key, scaled)].astype(jnp.int32)
        return jnp.where(sampling.temperature == 0, best, drawn)

    # Logits may be sharded over the vocabulary, which a sort does not take on Explicit mesh axes.
    arguments = (logits, keys, best, each)
    return in_auto_axes(jax.vmap(draw), *arguments, result=lambda: [spec_entry(logits, 0)])
