"""Arguments of decoding that people get wrong, refused by name before anything runs."""

import difflib
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fdq import processes
from fdq.models import FAMILIES

# What a model must have to be decoded, as `fdq.models.Decoder` has it.
_DECODER = ("config", "extend", "head", "init_cache")
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_OTHER_NAMES = {"max_tokens": "max_new_tokens", "max_length": "steps", "seed": "key", "rng": "key",
                "eos_token_id": "stop_tokens", "stop": "stop_tokens", "streamer": "stream",
                "callback": "stream", "input_ids": "prompts", "num_steps": "steps"}  # fmt: skip


def decodable(what: str, model: Any) -> None:
    """Raises TypeError, which says what decoding supports, unless `model` has what it needs."""
    missing = [name for name in _DECODER if not hasattr(model, name)]
    if not missing:
        return
    raise TypeError(
        f"{what}: a {type(model).__name__} cannot be decoded: it has no {', '.join(missing)}. "
        "Decoding takes a fdq.models.Decoder: what fdq.load makes of a checkpoint "
        f"({', '.join(FAMILIES)}), or Decoder(DecoderConfig(...), rngs=...). A model of your own "
        "decodes once it has these members as Decoder has them, extend(tokens, cache, start) "
        "writing keys and values to a fdq.KVCache; call it for its logits, quantized or not."
    )


def keywords(what: str, given: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raises TypeError for keyword arguments that a function has not, with what was meant."""
    known = [name for name in inspect.signature(function).parameters if name != "unknown"]
    for name, value in given.items():
        if name in _OF_SAMPLING:
            hint = f"how tokens are drawn is one argument: sampling=fdq.Sampling({name}={value!r})"
        elif name == "do_sample":
            hint = "sampling=fdq.Sampling() draws tokens, sampling=None takes the likeliest"
        else:
            other = _OTHER_NAMES.get(name)
            near = [other] if other in known else difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(known)}"
        raise TypeError(f"{what} has no argument {name}=; {hint}")


def integer(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """`value` as an int, also of NumPy and JAX; TypeError or ValueError otherwise."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected an integer, found {value!r}.")
    if number < least or (most is not None and number > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {limits}, found {number}.")
    return number


def token(name: str, value: Any, least: int = 0) -> int:
    """`value` as a token number, which an int32 can hold."""
    return integer(name, value, least, np.iinfo(np.int32).max)


def prng_key(key: Any) -> jax.Array:
    """A PRNG key, typed or of the older kind; None stands for `jax.random.key(0)`."""
    if key is None:
        return jax.random.key(0)
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    older = jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape
    if not (typed and key.ndim == 0) and not (dtype == jnp.uint32 and key.shape == older):
        found = repr(key) if dtype is None else f"{dtype} of shape {key.shape}"
        raise TypeError(f"key: expected one PRNG key, such as jax.random.key(7), found {found}.")
    return key


def function(name: str, value: Any) -> None:
    """Raises TypeError for what is there and cannot be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function, found {value!r}.")


def is_state(what: str, state: Any) -> None:
    """Raises TypeError for what is no `DecodeState`, ValueError for one that was donated."""
    if not hasattr(state, "last_tokens"):
        raise TypeError(
            f"{what}: expected the fdq.DecodeState that fdq.prefill returns, found a "
            f"{type(state).__name__}."
        )
    tokens = state.tokens
    if isinstance(tokens, jax.Array) and not isinstance(tokens, Tracer) and tokens.is_deleted():
        raise ValueError(
            f"{what}: this state was donated to an earlier call, which goes on from it in place. "
            "Use the state that the call returned; jax.tree.map(jnp.copy, state) keeps one."
        )


def integers(name: str, value: Any, shape: tuple[Any, ...]) -> Any:
    """`value`, a list too, as an array of integers of `shape`, whose None stands for any size.

    Raises:
      ValueError: another dtype or shape; casting would make tokens of logits.
    """
    if not hasattr(value, "dtype"):
        value = np.asarray(value)
    sizes = value.shape
    fits = len(sizes) == len(shape) and all(
        expected is None or found == expected for found, expected in zip(sizes, shape, strict=True)
    )
    if not fits or not (jnp.issubdtype(value.dtype, jnp.integer)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name}: expected integers of shape [{expected}], found {value.dtype} of shape "
            f"{list(sizes)}."
        )
    return value


def prompt_lengths(lengths: np.ndarray, batch: int, width: int, least: int = 1) -> int:
    """The length of the longest prompt; ValueError unless each is from `least` to `width`."""
    integers("prompt lengths", lengths, (batch,))
    if lengths.min(initial=width) < least or lengths.max(initial=least) > width:
        raise ValueError(
            f"prompt lengths {lengths.tolist()} must be between {least} and {width}, the width of "
            "tokens"
        )
    return int(lengths.max())


def empty(cache: Any) -> None:
    """Refuses a KV cache that holds tokens, as far as values are known."""
    if isinstance(cache.length, Tracer):
        return
    held = np.asarray(processes.on_host(cache.length))
    if held.any():
        raise ValueError(
            f"the cache holds {held.tolist()} tokens: expected an empty one. To go on, pass the "
            "state: prefill(model, tokens, state=state); to start again, make a new cache."
        )


def rollback_length(length: Any, known: jax.Array, least: int = 0) -> None:
    """Refuses lengths to go back to that are below `least` or above `known`, [B]."""
    if isinstance(length, Tracer) or isinstance(known, Tracer):
        return  # values are not known here: what uses them clips them
    wanted, known_now = map(np.asarray, processes.on_host((length, known)))
    if not np.issubdtype(wanted.dtype, np.integer) or wanted.shape not in ((), known_now.shape):
        raise ValueError(
            f"rollback: expected an integer or integers of shape {known_now.shape}, found "
            f"{wanted.dtype} of shape {wanted.shape}."
        )
    if (wanted < least).any() or (wanted > known_now).any():
        raise ValueError(
            f"rollback to {wanted.tolist()} tokens: expected {least} to {known_now.tolist()}, "
            "which are known."
        )
